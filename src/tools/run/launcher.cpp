#include "tools/run/launcher.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/signal_set.hpp>
#include <asio/steady_timer.hpp>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <list>
#include <map>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "launch/failure_report.hpp"
#include "tools/run/lines.hpp"
#include "tools/run/origin.hpp"
#include "tools/run/other_nodes.hpp"
#include "tools/run/output.hpp"
#include "tools/run/private_folder.hpp"
#include "tools/run/spawn.hpp"

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;
using asio::ip::tcp;

/// How long a rank's own children may go on writing once all ranks have ended.
constexpr auto kTimeToDrain = 1s;
constexpr auto kPauseWhileTelling = 20ms;

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

std::int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::system_clock::now().time_since_epoch()).count(); }

/// The first line of a rank's message, without its "rank 3: ".
std::string brief(const detail::FailureReport& report) {
  constexpr std::size_t longest = 1000;
  std::string text = report.message.substr(0, report.message.find('\n')).substr(0, longest);
  const std::string name = "rank " + std::to_string(report.rank) + ": ";
  return text.starts_with(name) ? text.substr(name.size()) : text;
}

bool is_terminal(int fd) {
  const char* kind = ::getenv("TERM");
  return ::isatty(fd) && kind != nullptr && std::string_view(kind) != "dumb";
}

/// The launcher's own environment with what makes a process a rank; variables of a launcher around this one must not
/// confuse the ranks.
std::vector<std::string> rank_environment(const Options& options, int local_rank,
                                          std::map<std::string, std::string> ours) {
  ours.merge(std::map<std::string, std::string>{
      {"RANK", std::to_string(options.node_rank * options.ranks + local_rank)},
      {"WORLD_SIZE", std::to_string(options.nodes * options.ranks)},
      {"LOCAL_RANK", std::to_string(local_rank)},
      {"LOCAL_WORLD_SIZE", std::to_string(options.ranks)},
      {"MASTER_ADDR", options.master_address},
      {"MASTER_PORT", std::to_string(options.master_port)},
      {"DUALPIPE_RUN_ID", options.run_id},
      {"DUALPIPE_RUN_TERMINAL", is_terminal(STDOUT_FILENO) ? "1" : "0"},
  });
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
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGTSTP, SIGCHLD}) {
      struct sigaction before{};
      ::sigaction(signal, nullptr, &before);
      if (before.sa_handler == SIG_IGN && signal != SIGCHLD) continue;  // as nohup asks, for the ranks as well
      signals_.add(signal);
      handled_.push_back(signal);
    }
    // Whoever started the launcher may have blocked them, and that is inherited.
    sigset_t heard;
    ::sigemptyset(&heard);
    for (const int signal : handled_) ::sigaddset(&heard, signal);
    ::pthread_sigmask(SIG_UNBLOCK, &heard, nullptr);
    handled_.push_back(SIGPIPE);
  }

  void start() {
    if (options_.master_port == 0) {
      port_ = reserved_port(io_);
      options_.master_port = port_->local_endpoint().port();
    }
    std::map<std::string, std::string> variables;
    const bool one_thread = options_.ranks > 1 && ::getenv("OMP_NUM_THREADS") == nullptr;
    if (one_thread) variables["OMP_NUM_THREADS"] = "1";
    // Nodes cannot agree on a secret here.
    if (options_.nodes == 1 && ::getenv("DUALPIPE_SECRET_FILE") == nullptr)
      variables["DUALPIPE_SECRET_FILE"] = make_secret(guard_.folder());
    if (options_.nodes > 1) other_nodes_.emplace(options_, guard_.folder());
    try {
      for (int local_rank = 0; local_rank < options_.ranks; ++local_rank) start_rank(local_rank, variables);
    } catch (...) {
      end_groups();
      throw;
    }
    if (one_thread && !options_.quiet)
      say("OMP_NUM_THREADS is not set: each rank gets 1 thread, so that ranks do not crowd each other");
  }

  int run() {
    await_signal();
    note_endings();  // those that ended before
    io_.run();
    end_groups();
    for (Stream& stream : streams_) write_out(stream.target, stream.labeller.finish());
    report();
    wait_until_told();
    flush();
    if (exit_code_ != 0) return *exit_code_;
    if (unwritable_) return 1;
    return given_up_by_ && is_waiting_for_a_reader() ? 128 + *given_up_by_ : 0;
  }

 private:
  struct Rank {
    int rank = 0;
    pid_t pid = -1;
    std::filesystem::path error_file;
    std::optional<Ending> ending{};
    std::int64_t ended_ns = 0;
    std::optional<detail::FailureReport> report{};
    bool was_ended = false;  ///< by the launcher, because another one had failed

    bool failed_by_itself() const { return ending && ending->failed() && !was_ended; }
  };
  /// One output stream of one rank.
  struct Stream {
    Stream(asio::io_context& io, int fd, int to, std::string label)
        : pipe(io, fd), target(to), labeller(std::move(label), is_terminal(to)) {}
    asio::posix::stream_descriptor pipe;
    const int target;
    LineLabeller labeller;
    std::array<char, 1 << 16> buffer;
  };

  void start_rank(int local_rank, std::map<std::string, std::string> variables) {
    const int rank = options_.node_rank * options_.ranks + local_rank;
    const std::filesystem::path error_file = guard_.folder() / ("error" + std::to_string(rank) + ".json");
    variables["DUALPIPE_ERROR_FILE"] = error_file;
    variables["DUALPIPE_FAILED_FILE"] = failed_file();
    if (other_nodes_) variables["DUALPIPE_MET_FILE"] = other_nodes_->met_file(rank);
    Command command;
    command.arguments = options_.program;
    command.environment = rank_environment(options_, local_rank, std::move(variables));
    command.default_signals = handled_;
    // A background process group that reads a terminal is stopped; only what is piped into the launcher is for rank 0.
    if (local_rank != 0 || ::isatty(STDIN_FILENO)) command.input = nothing_.get();
    std::optional<Pipe> output, error;
    if (options_.prefix) {
      command.output = output.emplace().write.get();
      command.error = error.emplace().write.get();
    }
    ranks_.push_back({.rank = rank, .pid = spawn(command, guard_), .error_file = error_file});
    if (!options_.prefix) return;
    const std::string label = std::regex_replace(options_.label, std::regex("%r"), std::to_string(rank));
    read_more(streams_.emplace_back(io_, output->read.release(), STDOUT_FILENO, label));
    read_more(streams_.emplace_back(io_, error->read.release(), STDERR_FILENO, label));
  }

  void read_more(Stream& stream) {
    if (flushing_) return;
    stream.pipe.async_read_some(asio::buffer(stream.buffer), [this, &stream](const asio::error_code& error,
                                                                             std::size_t size) {
      if (error == asio::error::operation_aborted) return;
      // A slow reader slows the ranks down, as their own terminal would.
      if (!error)
        return write_out(stream.target, stream.labeller.feed({stream.buffer.data(), size}, LineLabeller::Clock::now()),
                         [this, &stream] { read_more(stream); });
      write_out(stream.target, stream.labeller.finish(), [this, &stream] {
        streams_.remove_if([&](const Stream& other) { return &other == &stream; });
        stop_when_over();
      });
    });
  }

  /// @param then  runs once the reader has taken the text, or it is lost.
  void write_out(int target, std::string text, std::function<void()> then = [] {}) {
    (target == STDOUT_FILENO ? output_ : error_)
        .write(std::move(text), [this, target, then = std::move(then)](int error) {
          if (error != 0) cannot_write(target, error);
          then();
        });
  }

  void cannot_write(int target, int error) {
    if (error == EPIPE) {
      if (target == STDOUT_FILENO && !interrupted_ && !draining_) interrupt("ended by SIGPIPE", SIGTERM);
    } else if (!unwritable_) {
      unwritable_ = std::string(target == STDOUT_FILENO ? "standard output" : "standard error") +
                    " cannot be written: " + std::generic_category().message(error);
      if (!interrupted_ && !draining_ && first_failed_ == nullptr) interrupt(*unwritable_, SIGTERM);
    }
  }

  void say(const std::string& text) { write_out(STDERR_FILENO, "dualpipe-run: " + text + "\n"); }

  void await_signal() {
    signals_.async_wait([this](const asio::error_code& error, int signal) {
      if (error) return;
      signal == SIGCHLD ? note_endings() : forward(signal);
      await_signal();
    });
  }

  void forward(int signal) {
    if (signal == SIGUSR1 || signal == SIGUSR2) return signal_ranks(signal);
    if (signal == SIGTSTP) return suspend();
    if (draining_) {
      given_up_by_ = signal;
      return io_.stop();
    }
    interrupt("ended by " + signal_name(signal), interrupted_ ? SIGKILL : signal);  // asked twice: at once
  }

  /// Ranks are process groups of their own, to which a terminal says nothing.
  void suspend() {
    signal_ranks(SIGSTOP);
    ::raise(SIGSTOP);  // returns when somebody continues the launcher
    signal_ranks(SIGCONT);
  }

  void interrupt(const std::string& cause, int signal) {
    failed_uninterrupted_ = failed_uninterrupted_ || (first_failed_ != nullptr && !interrupted_);
    interrupted_ = cause;
    failed_uninterrupted_ ? end_ranks(signal) : signal_ranks(signal);
    kill_after_grace();
    note_endings();  // all that are left may be stopped
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
    bool all_ended = true, all_left_are_stopped = true;
    const bool failed_before = first_failed_ != nullptr;
    const std::int64_t now = now_ns();
    for (Rank& rank : ranks_) {
      if (rank.ending) continue;
      rank.ending = ending_of(rank.pid);
      if (!rank.ending) {
        all_ended = false;
        all_left_are_stopped = all_left_are_stopped && is_stopped(rank.pid);
        continue;
      }
      if (!rank.ending->failed()) continue;
      rank.ended_ns = now;
      rank.report = report_of(rank);
      if (first_failed_ == nullptr) tell_ranks_of(rank);
      // Of two that are found together the one that was killed is the cause, the other reacted.
      if (first_failed_ == nullptr || (!failed_before && rank.ending->killed && !first_failed_->ending->killed))
        first_failed_ = &rank;
    }
    tell_other_nodes();
    if (all_ended) {
      drain();
    } else if (interrupted_ && !failed_uninterrupted_) {
      if (all_left_are_stopped) signal_ranks(SIGKILL);
    } else if (first_failed_ != nullptr) {
      if (all_left_are_stopped)
        end_ranks(SIGKILL);  // they would not hear of anything else
      else if (!failed_before)
        after(options_.wait_before_term, [this] {
          end_ranks(SIGTERM);
          kill_after_grace();
        });
    }
  }

  std::filesystem::path failed_file() const { return guard_.folder() / "failed.json"; }

  static detail::FailureReport failure_of(const Rank& failed) {
    return failed.report.value_or(detail::FailureReport{.message = name(failed) + ": " + failed.ending->describe(),
                                                        .rank = failed.rank,
                                                        .origin = failed.rank,
                                                        .operation = {},
                                                        .time_ns = failed.ended_ns});
  }

  /// Those that it had not met yet learn of it by this file only.
  void tell_ranks_of(const Rank& failed) const {
    const std::filesystem::path file = failed_file(), unfinished = file.string() + ".unfinished";
    std::ofstream(unfinished, std::ios::binary) << detail::to_json(failure_of(failed));
    std::error_code ignored;  // without it they find out later
    std::filesystem::rename(unfinished, file, ignored);
  }

  /// Other nodes look for rank 0 on the first node, and for the rank that has failed on any other.
  void tell_other_nodes() {
    if (!other_nodes_ || first_failed_ == nullptr) return;
    const Rank& absent = options_.node_rank == 0 ? ranks_.front() : *first_failed_;
    if (absent.ending) other_nodes_->tell(absent.rank, failure_of(*first_failed_));
  }

  void wait_until_told() {
    if (!other_nodes_) return;
    const auto begin = std::chrono::steady_clock::now();
    bool said = false;
    while (!other_nodes_->is_over() && !given_up_by_) {
      if (!said && std::chrono::steady_clock::now() - begin > kTimeToTellInSilence) {
        if (interrupted_) return;  // whoever did so does not want to wait
        say(other_nodes_->wants());
        said = true;
      }
      io_.restart();
      io_.run_one_for(kPauseWhileTelling);
    }
    if (const std::string outcome = other_nodes_->outcome(); !outcome.empty()) say(outcome);
  }

  /// After a failure.
  void end_ranks(int signal) {
    if (!ended_from_ns_) ended_from_ns_ = now_ns();
    for (Rank& rank : ranks_) rank.was_ended = rank.was_ended || !rank.ending;
    signal_ranks(signal);
  }

  static std::optional<detail::FailureReport> report_of(const Rank& rank) {
    std::ifstream in(rank.error_file, std::ios::binary);
    std::optional<detail::FailureReport> report =
        detail::failure_report_from({std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()});
    if (report) report->rank = rank.rank;
    return report;
  }

  /// All ranks have ended. What they started may still hold their output.
  void drain() {
    if (draining_) return;
    draining_ = true;
    after_draining([this] {
      end_groups();
      after_draining([this] { io_.stop(); });
    });
    stop_when_over();
  }

  /// While our own reader takes nothing, that time is not over, but the user learns how the ranks have ended.
  template <class Action>
  void after_draining(Action action) {
    after(kTimeToDrain, [this, action] {
      if (!is_waiting_for_a_reader() || interrupted_) return action();
      report();
      after_draining(action);
    });
  }

  bool is_waiting_for_a_reader() const { return output_.is_waiting() || error_.is_waiting(); }

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

  /// What our readers have not taken yet; after an interruption not for long.
  void flush() {
    flushing_ = true;
    const auto end = std::chrono::steady_clock::now() + kTimeToDrain;
    while (is_waiting_for_a_reader() && !given_up_by_ && (!interrupted_ || std::chrono::steady_clock::now() < end)) {
      io_.restart();
      io_.run_one();  // no longer than an output waits to look again
    }
  }

  /// Once.
  void report() {
    if (exit_code_) return;
    const bool ended_for_it = unwritable_ && interrupted_ == unwritable_;
    exit_code_ = ended_for_it ? 1 : report_failure();
    if (unwritable_) say(*unwritable_);
  }

  /// @return the launcher's exit code.
  int report_failure() {
    if (first_failed_ == nullptr) return 0;
    const std::string first = name(*first_failed_);
    if (interrupted_ && !failed_uninterrupted_) {
      say(*interrupted_ + "; " + first + " ended first: " + first_failed_->ending->describe());
      return first_failed_->ending->exit_code();
    }
    const int origin = find_origin(testimonies()).value_or(first_failed_->rank);
    const int local_origin = origin - options_.node_rank * options_.ranks;
    if (local_origin < 0 || local_origin >= options_.ranks) {
      const Rank& witness = *std::find_if(
          ranks_.begin(), ranks_.end(), [&](const Rank& rank) { return rank.report && rank.report->origin == origin; });
      say("rank " + std::to_string(origin) + " on node " + std::to_string(origin / options_.ranks) + " failed first; " +
          name(witness) + " says: " + brief(*witness.report));
      return first_failed_->ending->exit_code();
    }
    const Rank& culprit = ranks_[local_origin];
    const bool has_words = culprit.report && culprit.report->origin == culprit.rank;
    const std::string words = has_words ? brief(*culprit.report) + "; " : "";
    if (culprit.failed_by_itself()) {
      say(name(culprit) + " failed first: " + words + culprit.ending->describe());
      return culprit.ending->exit_code();
    }
    if (!culprit.was_ended)
      say(name(culprit) + " failed first: it ended with exit code 0 while others needed it");
    else if (has_words)
      say(name(culprit) + " failed first: " + words + "killed, as it did not end");
    else
      say(name(culprit) + " was stopped or hung; killed");
    return first_failed_->ending->exit_code();
  }

  static std::string name(const Rank& rank) { return "rank " + std::to_string(rank.rank); }

  /// What the ranks of this node say of the one that failed first.
  std::vector<Testimony> testimonies() const {
    std::vector<Testimony> result;
    const int world_size = options_.nodes * options_.ranks;
    for (const Rank& rank : ranks_) {
      if (!rank.ending || !rank.ending->failed()) continue;
      if (!rank.report) {
        if (!rank.was_ended)
          result.push_back({.origin = rank.rank, .time_ns = rank.ended_ns, .killed = rank.ending->killed});
      } else if (rank.report->origin >= 0 && rank.report->origin < world_size) {
        // One that was ended by the launcher may call that its own failure.
        if (!rank.was_ended || rank.report->origin != rank.rank || rank.report->time_ns < ended_from_ns_.value_or(0))
          result.push_back({.origin = rank.report->origin, .time_ns = rank.report->time_ns});
      }
    }
    return result;
  }

  Options options_;
  Guard guard_;  // before anything that a second process should not hold
  const Descriptor nothing_{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
  asio::io_context io_;
  asio::signal_set signals_;
  asio::steady_timer patience_;
  std::vector<int> handled_;
  std::optional<tcp::socket> port_;
  std::vector<Rank> ranks_;
  std::list<Stream> streams_;  // that are open
  Output output_{io_, STDOUT_FILENO}, error_{io_, STDERR_FILENO};
  std::optional<OtherNodes> other_nodes_;
  const Rank* first_failed_ = nullptr;         // by the order in which they ended
  std::optional<std::int64_t> ended_from_ns_;  // when the launcher began to end ranks because another one had failed
  std::optional<std::string> interrupted_;     // by what
  bool failed_uninterrupted_ = false;          // the interruption came after the failure
  std::optional<std::string> unwritable_;      // output that is lost
  bool draining_ = false;
  std::optional<int> exit_code_;    // once it has been reported why
  bool flushing_ = false;           // nothing of the ranks is read any more
  std::optional<int> given_up_by_;  // the signal that came while our own readers took nothing
};

}  // namespace

int launch(const Options& options) {
  std::optional<Launcher> launcher;
  try {
    launcher.emplace(options);
    launcher->start();
  } catch (const std::exception& error) {
    launcher.reset();  // signals end this process again
    if (options.nodes > 1) tell_that_none_starts(options, error.what());
    throw;
  }
  return launcher->run();
}

}  // namespace dualpipe::run
