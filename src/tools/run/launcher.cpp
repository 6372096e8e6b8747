#include "tools/run/launcher.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <asio/io_context.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/signal_set.hpp>
#include <asio/steady_timer.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>

#include "tools/run/lines.hpp"
#include "tools/run/spawn.hpp"

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;

/// After a failure the other ranks usually end by themselves, with a message that names the culprit.
constexpr auto kTimeToEndByThemselves = 3s;
/// How long a rank's own children may go on writing once all ranks have ended.
constexpr auto kTimeToDrain = 1s;

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

void say(const std::string& text) { std::cerr << "dualpipe-run: " + text + "\n" << std::flush; }

/// A port that nobody else is given while this object lives. It is bound but does not listen, which lets rank 0 listen
/// there.
class ReservedPort {
 public:
  ReservedPort() {
    if (!bind_any(AF_INET6) && !bind_any(AF_INET))
      throw std::system_error(errno, std::generic_category(), "cannot reserve a port for the ranks to meet");
  }
  int port() const { return port_; }

 private:
  bool bind_any(int family) {
    socket_ = Descriptor(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int yes = 1;
    sockaddr_storage address{};
    address.ss_family = static_cast<sa_family_t>(family);
    socklen_t size = family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
    if (socket_.get() < 0 || ::setsockopt(socket_.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) != 0 ||
        ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0 ||
        ::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0)
      return false;
    port_ = ntohs(family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                     : reinterpret_cast<const sockaddr_in&>(address).sin_port);
    return true;
  }

  Descriptor socket_;
  int port_ = 0;
};

bool is_terminal(int fd) {
  const char* kind = ::getenv("TERM");
  return ::isatty(fd) && kind != nullptr && std::string_view(kind) != "dumb";
}

/// The launcher's own environment with what makes a process a rank; variables of a launcher around this one must not
/// confuse the ranks.
std::vector<std::string> rank_environment(const Options& options, int local_rank, bool one_thread) {
  std::map<std::string, std::string> ours = {
      {"RANK", std::to_string(options.node_rank * options.ranks + local_rank)},
      {"WORLD_SIZE", std::to_string(options.nodes * options.ranks)},
      {"LOCAL_RANK", std::to_string(local_rank)},
      {"LOCAL_WORLD_SIZE", std::to_string(options.ranks)},
      {"MASTER_ADDR", options.master_address},
      {"MASTER_PORT", std::to_string(options.master_port)},
      {"DUALPIPE_RUN_ID", options.run_id},
      {"DUALPIPE_RUN_TERMINAL", is_terminal(STDOUT_FILENO) ? "1" : "0"},
  };
  if (one_thread) ours["OMP_NUM_THREADS"] = "1";
  std::vector<std::string> result;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string_view text = *variable;
    const std::string name(text.substr(0, text.find('=')));
    if (!ours.contains(name) && !name.starts_with("TORCHELASTIC_")) result.emplace_back(text);
  }
  for (const auto& [name, value] : ours) result.push_back(name + "=" + value);
  return result;
}

/// How a process ended.
struct Ending {
  bool killed = false;
  int status = 0;  ///< exit code or signal
  bool failed() const { return killed || status != 0; }
  int exit_code() const { return killed ? 128 + status : status; }
  std::string describe() const {
    return killed ? "killed by " + signal_name(status) + " (signal " + std::to_string(status) + ")"
                  : "exit code " + std::to_string(status);
  }
};

class Launcher {
 public:
  explicit Launcher(const Options& options) : options_(options), signals_(io_), patience_(io_) {
    ::signal(SIGPIPE, SIG_IGN);  // a closed stdout is an error of write()
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCHLD}) {
      struct sigaction before{};
      ::sigaction(signal, nullptr, &before);
      if (before.sa_handler == SIG_IGN && signal != SIGCHLD) continue;  // as nohup asks, for the ranks as well
      signals_.add(signal);
      handled_.push_back(signal);
    }
    handled_.push_back(SIGPIPE);
  }

  int run() {
    start();
    await_signal();
    reap();  // those that ended before
    io_.run();
    end_groups();
    return report();
  }

 private:
  struct Rank {
    int rank = 0;
    pid_t pid = -1;
    std::optional<Ending> ending;
  };
  /// One output stream of one rank.
  struct Stream {
    Stream(asio::io_context& io, int fd, int to, std::string label)
        : pipe(io, fd), target(to), labeller(std::move(label), is_terminal(to)) {}
    asio::posix::stream_descriptor pipe;
    int target;
    LineLabeller labeller;
    std::array<char, 1 << 16> buffer;
  };

  void start() {
    const bool one_thread = options_.ranks > 1 && ::getenv("OMP_NUM_THREADS") == nullptr;
    if (options_.master_port == 0) {
      port_.emplace();
      options_.master_port = port_->port();
    }
    const Descriptor nothing(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    try {
      for (int local_rank = 0; local_rank < options_.ranks; ++local_rank)
        start_rank(local_rank, one_thread, nothing.get());
    } catch (...) {
      signal_ranks(SIGKILL);
      for (const Rank& rank : ranks_) ::waitpid(rank.pid, nullptr, 0);
      throw;
    }
    if (one_thread && !options_.quiet)
      say("OMP_NUM_THREADS is not set: each rank gets 1 thread, so that ranks do not crowd each other");
  }

  void start_rank(int local_rank, bool one_thread, int nothing) {
    const int rank = options_.node_rank * options_.ranks + local_rank;
    Command command;
    command.arguments = options_.program;
    command.environment = rank_environment(options_, local_rank, one_thread);
    command.default_signals = handled_;
    // A background process group that reads a terminal is stopped; only what is piped into the launcher is for rank 0.
    if (local_rank != 0 || ::isatty(STDIN_FILENO)) command.input = nothing;
    if (!options_.prefix) {
      ranks_.push_back({rank, spawn(command, guard_), std::nullopt});
      return;
    }
    Pipe output, error;
    command.output = output.write.get();
    command.error = error.write.get();
    ranks_.push_back({rank, spawn(command, guard_), std::nullopt});
    read_from(std::move(output.read), STDOUT_FILENO, rank);
    read_from(std::move(error.read), STDERR_FILENO, rank);
  }

  void read_from(Descriptor pipe, int target, int rank) {
    std::string label = options_.label;
    const std::string number = std::to_string(rank);
    for (std::size_t at = 0; (at = label.find("%r", at)) != std::string::npos; at += number.size())
      label.replace(at, 2, number);
    streams_.push_back(std::make_unique<Stream>(io_, pipe.release(), target, std::move(label)));
    ++open_streams_;
    read_more(*streams_.back());
  }

  void read_more(Stream& stream) {
    stream.pipe.async_read_some(
        asio::buffer(stream.buffer), [this, &stream](const asio::error_code& error, std::size_t size) {
          if (error == asio::error::operation_aborted) return;
          if (error) {
            write_out(stream.target, stream.labeller.finish());
            stream.pipe.close();
            --open_streams_;
            stop_when_over();
            return;
          }
          write_out(stream.target, stream.labeller.feed({stream.buffer.data(), size}, LineLabeller::Clock::now()));
          read_more(stream);
        });
  }

  /// Waits for a slow reader, which slows the ranks down as their own terminal would.
  void write_out(int target, std::string_view text) {
    while (!text.empty()) {
      const ssize_t written = ::write(target, text.data(), text.size());
      if (written >= 0) {
        text.remove_prefix(static_cast<std::size_t>(written));
      } else if (errno == EAGAIN) {
        ::usleep(1000);  // somebody else made our stdout non-blocking
      } else if (errno != EINTR) {
        if (target == STDOUT_FILENO && errno == EPIPE && !interrupted_ && !draining_) interrupt(SIGPIPE, SIGTERM);
        return;
      }
    }
  }

  void await_signal() {
    signals_.async_wait([this](const asio::error_code& error, int signal) {
      if (error) return;
      if (signal == SIGCHLD)
        reap();
      else
        forward(signal);
      await_signal();
    });
  }

  void forward(int signal) {
    if (draining_) return io_.stop();
    if (signal == SIGUSR1 || signal == SIGUSR2) return signal_ranks(signal);
    interrupt(signal, interrupted_ ? SIGKILL : signal);  // asked twice: at once
  }

  void interrupt(int cause, int signal) {
    interrupted_ = cause;
    ending_ = true;
    signal_ranks(signal);
    kill_after_grace();
  }

  void kill_after_grace() {
    patience_.expires_after(options_.grace);
    patience_.async_wait([this](const asio::error_code& error) {
      if (!error) signal_ranks(SIGKILL);
    });
  }

  void signal_ranks(int signal) {
    for (const Rank& rank : ranks_) {
      if (!rank.ending) ::kill(-rank.pid, signal);
    }
  }

  /// Notes who has ended, without reaping: while the leader is a zombie nobody else gets its process group's number.
  void reap() {
    bool failed_now = false;
    bool all_ended = true;
    const bool failed_before = first_failed_.has_value();
    for (Rank& rank : ranks_) {
      if (rank.ending) continue;
      siginfo_t info{};
      if (::waitid(P_PID, static_cast<id_t>(rank.pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0) {
        all_ended = false;
        continue;
      }
      rank.ending = Ending{info.si_code != CLD_EXITED, info.si_status};
      if (!rank.ending->failed()) continue;
      // Of two that are found together the one that was killed is the cause, the other reacted.
      if (!first_failed_ || (!failed_before && rank.ending->killed && !first_failed_->ending->killed))
        first_failed_ = rank;
      failed_now = true;
    }
    if (all_ended) {
      drain();
    } else if (failed_now && !ending_) {
      ending_ = true;
      patience_.expires_after(kTimeToEndByThemselves);
      patience_.async_wait([this](const asio::error_code& error) {
        if (error) return;
        signal_ranks(SIGTERM);
        kill_after_grace();
      });
    }
  }

  /// All ranks have ended. What they started may still hold their output.
  void drain() {
    if (draining_) return;
    draining_ = true;
    patience_.expires_after(kTimeToDrain);
    patience_.async_wait([this](const asio::error_code& error) {
      if (error) return;
      end_groups();
      patience_.expires_after(kTimeToDrain);
      patience_.async_wait([this](const asio::error_code& again) {
        if (!again) io_.stop();
      });
    });
    stop_when_over();
  }

  void stop_when_over() {
    if (draining_ && open_streams_ == 0) io_.stop();
  }

  void end_groups() {
    for (Rank& rank : ranks_) {
      if (rank.pid < 0) continue;
      ::kill(-rank.pid, SIGKILL);
      while (::waitpid(rank.pid, nullptr, 0) < 0 && errno == EINTR) {
      }
      rank.pid = -1;
    }
  }

  int report() {
    for (const auto& stream : streams_) write_out(stream->target, stream->labeller.finish());
    if (!first_failed_) return 0;
    std::string text;
    if (interrupted_) text = "ended by " + signal_name(*interrupted_) + "; ";
    say(text + "rank " + std::to_string(first_failed_->rank) + (interrupted_ ? " ended first: " : " failed first: ") +
        first_failed_->ending->describe());
    return first_failed_->ending->exit_code();
  }

  Options options_;
  Guard guard_;  // before anything that a second process should not hold
  asio::io_context io_;
  asio::signal_set signals_;
  asio::steady_timer patience_;
  std::vector<int> handled_;
  std::optional<ReservedPort> port_;
  std::vector<Rank> ranks_;
  std::vector<std::unique_ptr<Stream>> streams_;
  int open_streams_ = 0;
  std::optional<Rank> first_failed_;
  std::optional<int> interrupted_;
  bool ending_ = false;
  bool draining_ = false;
};

}  // namespace

int launch(const Options& options) { return Launcher(options).run(); }

}  // namespace dualpipe::run
