#include "tools/run/launcher.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/signal_set.hpp>
#include <asio/steady_timer.hpp>
#include <cerrno>
#include <cstdio>
#include <iostream>
#include <list>
#include <map>
#include <optional>
#include <regex>
#include <string_view>
#include <system_error>

#include "tools/run/lines.hpp"
#include "tools/run/spawn.hpp"

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;
using asio::ip::tcp;

/// After a failure the other ranks usually end by themselves, with a message that names the culprit.
constexpr auto kTimeToEndByThemselves = 3s;
/// How long a rank's own children may go on writing once all ranks have ended.
constexpr auto kTimeToDrain = 1s;

void say(const std::string& text) { std::cerr << "dualpipe-run: " + text + "\n" << std::flush; }

/// A port that nobody else is given while the socket lives. It is bound but does not listen, which lets rank 0 listen
/// there.
tcp::socket reserved_port(asio::io_context& io) {
  const auto reserved = [&](tcp protocol) {
    tcp::socket socket(io, protocol);
    ::fcntl(socket.native_handle(), F_SETFD, FD_CLOEXEC);
    socket.set_option(tcp::socket::reuse_address(true));
    socket.bind({protocol, 0});
    return socket;
  };
  try {
    return reserved(tcp::v6());
  } catch (const std::system_error&) {  // no IPv6 here
  }
  try {
    return reserved(tcp::v4());
  } catch (const std::system_error& error) {
    throw std::system_error(error.code(), "cannot reserve a port for the ranks to meet");
  }
}

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
    note_endings();  // those that ended before
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
    if (options_.master_port == 0) {
      port_ = reserved_port(io_);
      options_.master_port = port_->local_endpoint().port();
    }
    try {
      for (int local_rank = 0; local_rank < options_.ranks; ++local_rank) start_rank(local_rank);
    } catch (...) {
      end_groups();
      throw;
    }
    if (one_thread_ && !options_.quiet)
      say("OMP_NUM_THREADS is not set: each rank gets 1 thread, so that ranks do not crowd each other");
  }

  void start_rank(int local_rank) {
    const int rank = options_.node_rank * options_.ranks + local_rank;
    Command command;
    command.arguments = options_.program;
    command.environment = rank_environment(options_, local_rank, one_thread_);
    command.default_signals = handled_;
    // A background process group that reads a terminal is stopped; only what is piped into the launcher is for rank 0.
    if (local_rank != 0 || ::isatty(STDIN_FILENO)) command.input = nothing_.get();
    std::optional<Pipe> output, error;
    if (options_.prefix) {
      command.output = output.emplace().write.get();
      command.error = error.emplace().write.get();
    }
    ranks_.push_back({rank, spawn(command, guard_), std::nullopt});
    if (!options_.prefix) return;
    const std::string label = std::regex_replace(options_.label, std::regex("%r"), std::to_string(rank));
    read_more(streams_.emplace_back(io_, output->read.release(), STDOUT_FILENO, label));
    read_more(streams_.emplace_back(io_, error->read.release(), STDERR_FILENO, label));
  }

  void read_more(Stream& stream) {
    stream.pipe.async_read_some(
        asio::buffer(stream.buffer), [this, &stream](const asio::error_code& error, std::size_t size) {
          if (error == asio::error::operation_aborted) return;
          if (!error) {
            write_out(stream.target, stream.labeller.feed({stream.buffer.data(), size}, LineLabeller::Clock::now()));
            return read_more(stream);
          }
          write_out(stream.target, stream.labeller.finish());
          streams_.remove_if([&](const Stream& other) { return &other == &stream; });
          stop_when_over();
        });
  }

  /// Waits for a slow reader, which slows the ranks down as their own terminal would.
  void write_out(int target, std::string_view text) {
    while (!text.empty()) {
      const ssize_t written = ::write(target, text.data(), text.size());
      if (written >= 0) {
        text.remove_prefix(written);
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
      signal == SIGCHLD ? note_endings() : forward(signal);
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
    signal_ranks(signal);
    kill_after_grace();
  }

  void kill_after_grace() {
    after(options_.grace, [this] { signal_ranks(SIGKILL); });
  }

  /// In place of what it was to do before.
  template <class Action>
  void after(std::chrono::milliseconds delay, Action action) {
    patience_.expires_after(delay);
    patience_.async_wait([action](const asio::error_code& error) {
      if (!error) action();
    });
  }

  void signal_ranks(int signal) {
    for (const Rank& rank : ranks_) {
      if (!rank.ending) ::kill(-rank.pid, signal);
    }
  }

  void note_endings() {
    bool all_ended = true;
    const bool failed_before = first_failed_.has_value();
    for (Rank& rank : ranks_) {
      if (rank.ending) continue;
      rank.ending = ending_of(rank.pid);
      all_ended = all_ended && rank.ending;
      if (!rank.ending || !rank.ending->failed()) continue;
      // Of two that are found together the one that was killed is the cause, the other reacted.
      if (!first_failed_ || (!failed_before && rank.ending->killed && !first_failed_->ending->killed))
        first_failed_ = rank;
    }
    if (all_ended) {
      drain();
    } else if (first_failed_ && !failed_before && !interrupted_) {
      after(kTimeToEndByThemselves, [this] {
        signal_ranks(SIGTERM);
        kill_after_grace();
      });
    }
  }

  /// All ranks have ended. What they started may still hold their output.
  void drain() {
    if (draining_) return;
    draining_ = true;
    after(kTimeToDrain, [this] {
      end_groups();
      after(kTimeToDrain, [this] { io_.stop(); });
    });
    stop_when_over();
  }

  void stop_when_over() {
    if (draining_ && streams_.empty()) io_.stop();
  }

  void end_groups() {
    for (Rank& rank : ranks_) {
      if (rank.pid < 0) continue;
      end_group(rank.pid);
      rank.pid = -1;
    }
  }

  int report() {
    for (Stream& stream : streams_) write_out(stream.target, stream.labeller.finish());
    if (!first_failed_) return 0;
    std::string text;
    if (interrupted_) text = "ended by " + signal_name(*interrupted_) + "; ";
    say(text + "rank " + std::to_string(first_failed_->rank) + (interrupted_ ? " ended first: " : " failed first: ") +
        first_failed_->ending->describe());
    return first_failed_->ending->exit_code();
  }

  Options options_;
  const bool one_thread_ = options_.ranks > 1 && ::getenv("OMP_NUM_THREADS") == nullptr;
  Guard guard_;  // before anything that a second process should not hold
  const Descriptor nothing_{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
  asio::io_context io_;
  asio::signal_set signals_;
  asio::steady_timer patience_;
  std::vector<int> handled_;
  std::optional<tcp::socket> port_;
  std::vector<Rank> ranks_;
  std::list<Stream> streams_;  // that are open
  std::optional<Rank> first_failed_;
  std::optional<int> interrupted_;
  bool draining_ = false;
};

}  // namespace

int launch(const Options& options) { return Launcher(options).run(); }

}  // namespace dualpipe::run
