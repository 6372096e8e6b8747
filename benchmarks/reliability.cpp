// What a fault does to a job of several processes: whom the others name, and the time until the last of them is out.
// Prints the table of docs/reliability.md. Exits with 1 if a rank named another than the culprit, or none.
//
//   dualpipe-bench-reliability
//   dualpipe-bench-reliability --ranks 4 --repetitions 50 --fault killed-step stopped-step
//   dualpipe-bench-reliability --list
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "contact/stand_in.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/detail/host.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"
#include "dualpipe/pipeline/observer.hpp"
#include "launch/failure_report.hpp"
#include "launch/two_nodes.hpp"
#include "temporary_folder.hpp"

namespace {

using namespace dualpipe;
using namespace std::chrono_literals;
using dualpipe::detail::now_ns;
using dualpipe::detail::str;

// ---- what ranks do

/// What a rank tells the benchmark, in memory that both see.
struct Seen {
  std::atomic<std::int64_t> struck_ns{0};  ///< when the fault began here; 0: it has not
  std::atomic<bool> ready{false};          ///< it exchanges messages
  std::atomic<int> named{-1};              ///< whom it names, -1: nobody
  std::atomic<int> over{-1};               ///< how many steps were over when it failed
  char text[8000] = {};                    ///< of its error
};

struct Rank {
  World world;
  ConnectOptions options;
  int culprit = 0;
  std::uint32_t seed = 0;  ///< of this repetition
  Seen* seen = nullptr;

  bool is_culprit() const { return world.rank == culprit; }
  /// The fault begins now.
  void strike() const { seen->struck_ns = now_ns(); }
  void strike_by(int signal) const {
    strike();
    std::raise(signal);
  }
  [[noreturn]] void strike_by_throwing(const char* text) const {
    strike();
    throw std::runtime_error(text);
  }
};

/// What the culprit does within its third step; all of it may be empty.
struct Inject {
  std::function<void()> forward = {}, backward = {}, loss = {};
  std::shared_ptr<Observer> observer = {};
};

constexpr int steps_before = 2;

/// A pipeline in training. The model is small: what is measured is not the computation.
struct Training {
  Training(const Rank& rank, Inject given = {})
      : comm(connect_sockets(rank.world, rank.options)),
        inject(rank.is_culprit() ? std::move(given) : Inject()),
        num_micro_batches(2 * rank.world.size),
        pipe(comm, DualPipeOptions{.num_micro_batches = num_micro_batches}, [this](int) { return stage(); }),
        seen(rank.seen) {
    if (inject.observer) pipe->add_observer(inject.observer);
    batch.inputs = {torch::ones({num_micro_batches, width})};
    batch.targets = {torch::zeros({num_micro_batches, width})};
    for (int i = 0; i < steps_before; ++i) step();
    comm->barrier().wait();
    seen->ready = true;
    armed = true;
  }

  void step() {
    pipe->step(batch, [this](const Tensors& outputs, const Tensors& targets) {
      if (armed && inject.loss) inject.loss();
      return torch::mse_loss(outputs[0], targets[0]);
    });
  }
  /// Until a rank fails. Others do not fail in step 3, but on their way to one that comes later.
  void steps() {
    for (;;) step();
  }

  static constexpr int width = 16;
  std::shared_ptr<Communicator> comm;
  Inject inject;
  int num_micro_batches;
  bool armed = false;
  DualPipe pipe;
  Seen* seen;
  Batch batch;

 private:
  Stage stage() {
    torch::nn::Linear linear(width, width);
    return Stage(linear.ptr()).compute("layer", [this, linear](const Tensors& x, const StageContext& context) mutable {
      const bool now = armed && context.micro_batch == num_micro_batches / 2;
      if (now && inject.forward) inject.forward();
      torch::Tensor y = torch::tanh(linear->forward(x[0]));
      if (now && inject.backward && y.requires_grad())
        y.register_hook([this](const torch::Tensor& gradient) {
          inject.backward();
          return gradient;
        });
      return Tensors{y};
    });
  }
};

enum class Moment { begin, record, end };

struct FailingObserver final : Observer {
  FailingObserver(const Rank& of, Moment at) : rank(of), moment(at) {}
  void begin(std::int64_t step) override { fail(Moment::begin, step); }
  void record(const Interval&) override { fail(Moment::record, number); }
  void end(bool) override { fail(Moment::end, number); }
  void fail(Moment now, std::int64_t step) {
    number = step;
    if (now == moment && step >= steps_before) rank.strike_by_throwing("the observer has no disk");
  }
  const Rank& rank;
  Moment moment;
  std::int64_t number = 0;
};

/// Commits as fast as it can, until the culprit is killed at some moment.
void vote(const Rank& rank) {
  const auto comm = connect_sockets(rank.world, rank.options);
  comm->barrier().wait();
  rank.seen->ready = true;
  std::jthread striker([&] {
    if (!rank.is_culprit()) return;
    std::this_thread::sleep_for(std::chrono::microseconds(std::mt19937(rank.seed)() % 20'000));
    rank.strike_by(SIGKILL);
  });
  int over = 0;
  try {
    for (;; ++over) comm->commit("");
  } catch (...) {
    rank.seen->over = over;
    throw;
  }
}

/// Connects while the last rank is late; the culprit gets `signal` meanwhile.
void meet(const Rank& rank, int signal) {
  std::jthread striker([&] {
    if (!rank.is_culprit()) return;
    std::this_thread::sleep_for(500ms);
    rank.strike_by(signal);
  });
  connect_sockets(rank.world, rank.options);
}

int listen_at(const std::string& address, int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in place{};
  place.sin_family = AF_INET;
  place.sin_port = htons(static_cast<std::uint16_t>(port));
  ::inet_pton(AF_INET, address.c_str(), &place.sin_addr);
  if (::bind(fd, reinterpret_cast<const sockaddr*>(&place), sizeof place) != 0 || ::listen(fd, 16) != 0)
    throw std::runtime_error(str("cannot listen at ", address, ":", port));
  return fd;
}

int free_port() {
  const int fd = listen_at("127.0.0.1", 0);
  sockaddr_in place{};
  socklen_t size = sizeof place;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&place), &size);
  ::close(fd);
  return ntohs(place.sin_port);
}

/// Leaves this process `more` descriptors than it has now.
void limit_descriptors(rlim_t more) {
  std::vector<int> held;
  for (rlim_t i = 0; i <= more; ++i) held.push_back(::dup(STDIN_FILENO));
  const rlimit limit{static_cast<rlim_t>(held.back()), static_cast<rlim_t>(held.back())};
  for (const int fd : held) ::close(fd);
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// ---- faults

struct Flags {
  std::vector<int> ranks{4, 8};
  int repetitions = 20;
  std::vector<std::string> faults;
  double liveness = 1;
  double timeout = 2;
  double limit = 30;
  int at_once = 5;
  bool list = false;
  bool verbose = false;
};

enum class Culprit { middle, first, second, last };

struct Fault {
  std::string name;
  std::string injected;
  std::string promise;
  std::function<void(const Rank&)> body = {};
  Culprit culprit = Culprit::middle;
  /// Each error has all of these; {culprit} stands for its rank.
  std::vector<std::string> says = {};
  bool silent = false;          ///< the culprit is gone, or never comes back: it names nobody and is not waited for
  bool culprit_names = true;    ///< otherwise it ends well
  bool named_by_text = false;   ///< the error is InvalidArgument, which has no origin
  bool last_is_absent = false;  ///< the last rank is never started
  bool short_timeout = false;   ///< Flags::timeout; otherwise it is a minute
  bool two_nodes = false;
  bool told_by_launcher = false;  ///< that of the culprit's node tells its ranks that it has ended
  bool cut = false;               ///< the cable, once all ranks are ready: the ranks of the other node are the culprits
};

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds);
  return text;
}

/// `size` is what the culprit takes for the number of ranks.
void connect_with_other_size(const Rank& rank, int size) {
  World world = rank.world;
  if (rank.is_culprit()) {
    world.size = size;
    rank.strike();
  }
  connect_sockets(world, rank.options);
}

std::vector<Fault> all_faults(const Flags& flags) {
  const std::string at_once = "2 s";
  const std::string liveness = "liveness + 2 s, here " + seconds_text(flags.liveness + 2);
  const std::string timeout = "timeout + 2 s, here " + seconds_text(flags.timeout + 2);
  const auto trains = [](auto inject) { return [inject](const Rank& rank) { Training(rank, inject(rank)).steps(); }; };
  const auto observes = [](Moment moment) {
    return [moment](const Rank& rank) {
      const auto observer = std::make_shared<FailingObserver>(rank, moment);
      Training(rank, {.observer = observer}).steps();
    };
  };
  /// The culprit does `other` in place of the third step.
  const auto differs = [](auto other) {
    return [other](const Rank& rank) {
      Training training(rank);
      if (rank.is_culprit()) {
        rank.strike();
        other(training);
      } else {
        training.step();
      }
    };
  };
  const std::string different = "ranks call different methods: rank 0 calls step(), rank {culprit} calls ";
  const auto dies_early = [](const Rank& rank) {
    if (rank.is_culprit()) rank.strike_by(SIGKILL);
    connect_sockets(rank.world, rank.options);
  };
  return {
      // The ranks meet.
      {.name = "killed-early-0",
       .injected = "two nodes; rank 0 is killed before it listens; its launcher tells the others",
       .promise = at_once,
       .body = dies_early,
       .culprit = Culprit::first,
       .says = {"rank 0 ended before it met the others"},
       .silent = true,
       .two_nodes = true,
       .told_by_launcher = true},
      {.name = "killed-early-last",
       .injected = "two nodes; the last rank is killed before it connects; its launcher tells the others",
       .promise = at_once,
       .body = dies_early,
       .culprit = Culprit::last,
       .says = {"rank {culprit} ended before it met the others"},
       .silent = true,
       .two_nodes = true,
       .told_by_launcher = true},
      {.name = "killed-meeting-0",
       .injected = "rank 0 is killed while all wait for the last rank",
       .promise = at_once,
       .body = [](const Rank& rank) { meet(rank, SIGKILL); },
       .culprit = Culprit::first,
       .says = {"while the ranks were meeting"},
       .silent = true,
       .last_is_absent = true},
      {.name = "killed-meeting-1",
       .injected = "rank 1 is killed while all wait for the last rank",
       .promise = at_once,
       .body = [](const Rank& rank) { meet(rank, SIGKILL); },
       .culprit = Culprit::second,
       .says = {"while the ranks were meeting"},
       .silent = true,
       .last_is_absent = true},
      {.name = "stopped-meeting-0",
       .injected = "rank 0 is stopped (SIGSTOP) while all wait for the last rank",
       .promise = liveness,
       .body = [](const Rank& rank) { meet(rank, SIGSTOP); },
       .culprit = Culprit::first,
       .says = {"no sign of life"},
       .silent = true,
       .last_is_absent = true},
      {.name = "stopped-meeting-1",
       .injected = "rank 1 is stopped while all wait for the last rank",
       .promise = liveness,
       .body = [](const Rank& rank) { meet(rank, SIGSTOP); },
       .culprit = Culprit::second,
       .says = {"no sign of life"},
       .silent = true,
       .last_is_absent = true},
      {.name = "absent",
       .injected = "the last rank is never started",
       .promise = timeout,
       .body = [](const Rank& rank) { connect_sockets(rank.world, rank.options); },
       .culprit = Culprit::last,
       .says = {"no sign of rank {culprit}"},
       .silent = true,
       .last_is_absent = true,
       .short_timeout = true},
      {.name = "world-size",
       .injected = "the last rank has another WORLD_SIZE",
       .promise = at_once,
       .body = [](const Rank& rank) { connect_with_other_size(rank, rank.world.size + 1); },
       .culprit = Culprit::last,
       .says = {"rank {culprit} has WORLD_SIZE"}},
      {.name = "world-size-0",
       .injected = "rank 0 has half the WORLD_SIZE of the others",
       .promise = at_once,
       .body = [](const Rank& rank) { connect_with_other_size(rank, rank.world.size / 2); },
       .culprit = Culprit::first,
       .says = {", rank 0 has"},
       .named_by_text = true},
      {.name = "port-taken",
       .injected = "two nodes; a process at rank 0's port that never answers",
       .promise = timeout,
       .body =
           [](const Rank& rank) {
             if (rank.is_culprit()) listen_at(rank.world.master_address, rank.world.master_port);
             rank.strike();
             connect_sockets(rank.world, rank.options);
           },
       .culprit = Culprit::first,
       // On its node the others come to rank 0, which cannot listen; those of the other node find somebody silent there.
       .says = {testing::TwoNodes::address(0) + ":29500", "MASTER_PORT"},
       .short_timeout = true,
       .two_nodes = true},
      {.name = "descriptors",
       .injected = "a rank has no file descriptors left when it connects",
       .promise = timeout,
       .body =
           [](const Rank& rank) {
             if (rank.is_culprit()) {
               limit_descriptors(rank.seed % 8);
               rank.strike();
             }
             connect_sockets(rank.world, rank.options);
           },
       .short_timeout = true},
      // A rank dies, or is as good as dead.
      {.name = "killed-step",
       .injected = "a rank is killed in a forward",
       .promise = at_once,
       .body = trains([](const Rank& rank) { return Inject{.forward = [&] { rank.strike_by(SIGKILL); }}; }),
       .says = {"rank {culprit} closed its connection"},
       .silent = true},
      {.name = "killed-between",
       .injected = "a rank is killed between two steps",
       .promise = at_once,
       .body = differs([](Training&) { std::raise(SIGKILL); }),
       .says = {"rank {culprit} closed its connection"},
       .silent = true},
      {.name = "killed-vote",
       .injected = "ranks do nothing but vote; one is killed at a random moment",
       .promise = at_once + ", all at one step",
       .body = vote,
       .says = {"rank {culprit} closed its connection"},
       .silent = true},
      {.name = "killed-child",
       .injected = "a rank is killed in a forward; a program that it has started runs on",
       .promise = at_once,
       .body = trains([](const Rank& rank) {
         return Inject{.forward = [&] {
           if (std::system("sleep 3 </dev/null >/dev/null 2>&1 &") != 0) throw std::runtime_error("no shell");
           rank.strike_by(SIGKILL);
         }};
       }),
       .says = {"rank {culprit} closed its connection"},
       .silent = true},
      {.name = "killed-fork",
       .injected = "a rank is killed in a forward; a child that it has forked, without a program of its own, lives on",
       .promise = liveness,
       .body = trains([](const Rank& rank) {
         return Inject{.forward = [&] {
           if (::fork() == 0) {
             ::sleep(5);
             ::_exit(0);
           }
           rank.strike_by(SIGKILL);
         }};
       }),
       .says = {"rank {culprit} has given no sign of life"},
       .silent = true},
      {.name = "stopped-step",
       .injected = "a rank is stopped in a forward",
       .promise = liveness,
       .body = trains([](const Rank& rank) { return Inject{.forward = [&] { rank.strike_by(SIGSTOP); }}; }),
       .says = {"rank {culprit} has given no sign of life"},
       .silent = true},
      {.name = "looping",
       .injected = "a forward never returns",
       .promise = timeout,
       .body = trains([](const Rank& rank) {
         return Inject{.forward = [&] {
           rank.strike();
           for (;;) std::this_thread::sleep_for(1ms);
         }};
       }),
       .says = {"longer than the timeout"},
       .silent = true,
       .short_timeout = true},
      {.name = "cut-cable",
       .injected = "half of the ranks are on another node; the cable is cut in a step",
       .promise = liveness,
       .body = [](const Rank& rank) { Training(rank).steps(); },
       .says = {"no sign of life"},
       .two_nodes = true,
       .cut = true},
      // User code throws.
      {.name = "throws-forward",
       .injected = "a forward throws",
       .promise = at_once,
       .body = trains(
           [](const Rank& rank) { return Inject{.forward = [&] { rank.strike_by_throwing("no such token"); }}; }),
       .says = {"no such token"}},
      {.name = "throws-loss",
       .injected = "the loss throws",
       .promise = at_once,
       .body = trains([](const Rank& rank) {
         return Inject{
             .forward = {}, .backward = {}, .loss = [&] { rank.strike_by_throwing("the loss is no number"); }};
       }),
       .culprit = Culprit::last,
       .says = {"the loss is no number"}},
      {.name = "throws-hook",
       .injected = "a tensor's hook throws in a backward",
       .promise = at_once,
       .body = trains([](const Rank& rank) {
         return Inject{.backward = [&] { rank.strike_by_throwing("a gradient is no number"); }};
       }),
       .says = {"a gradient is no number"}},
      {.name = "throws-observer-begin",
       .injected = "Observer::begin throws",
       .promise = at_once,
       .body = observes(Moment::begin),
       .says = {"the observer has no disk"}},
      {.name = "throws-observer-record",
       .injected = "Observer::record throws",
       .promise = at_once,
       .body = observes(Moment::record),
       .says = {"the observer has no disk"}},
      {.name = "throws-observer-end",
       .injected = "Observer::end throws",
       .promise = at_once,
       .body = observes(Moment::end),
       .says = {"rank {culprit}", "the observer has no disk"},
       .named_by_text = true},
      {.name = "throws-optimizer",
       .injected = "the optimizer throws between two steps, and its rank ends",
       .promise = at_once,
       .body = differs([](Training&) { throw std::runtime_error("the optimizer has no memory"); })},
      // Ranks that do different things.
      {.name = "evaluates",
       .injected = "a rank calls evaluate(), the others step()",
       .promise = at_once,
       .body = differs([](Training& training) {
         training.pipe->evaluate(training.batch, [](const Tensors& outputs, const Tensors& targets) {
           return torch::mse_loss(outputs[0], targets[0]);
         });
       }),
       .says = {different + "evaluate()"},
       .named_by_text = true},
      {.name = "clips",
       .injected = "a rank calls clip_grad_norm_(), the others step()",
       .promise = at_once,
       .body = differs([](Training& training) { training.pipe->clip_grad_norm_(1); }),
       .says = {different + "clip_grad_norm_()"},
       .named_by_text = true},
      {.name = "leaves",
       .injected = "a rank leaves its loop and ends well, the others call step()",
       .promise = at_once,
       .body = differs([](Training&) {}),
       .says = {"rank {culprit} has left"},
       .culprit_names = false},
  };
}

// ---- a job

/// Of one fault on one number of ranks.
struct Outcome {
  int right = 0, wrong = 0;           ///< ranks that named
  std::vector<double> seconds;        ///< until the last rank was out, by repetition
  std::vector<std::string> problems;  ///< of those that were wrong
};

class Job {
 public:
  Job(const Fault& fault, int size, std::uint32_t seed, const Flags& flags)
      : fault_(fault), size_(size), seed_(seed), flags_(flags), pids_(size, -1), ended_ns_(size, 0) {
    const std::size_t bytes = sizeof(Seen) * static_cast<std::size_t>(size);
    memory_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::runtime_error("no memory to share");
    seen_ = static_cast<Seen*>(memory_);
    for (int rank = 0; rank < size; ++rank) new (seen_ + rank) Seen();
  }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;
  ~Job() {
    pids_.push_back(launcher_);
    for (const pid_t pid : pids_)
      if (pid > 0) {
        ::kill(pid, SIGKILL);
        ::waitpid(pid, nullptr, 0);
      }
    ::munmap(memory_, sizeof(Seen) * static_cast<std::size_t>(size_));
  }

  void start() {
    if (fault_.two_nodes) nodes_ = std::make_unique<testing::TwoNodes>();
    port_ = fault_.two_nodes ? 29500 : free_port();
    struck_ns_ = now_ns();
    limit_ns_ = now_ns() + static_cast<std::int64_t>(flags_.limit * 1e9);
    for (int rank = 0; rank < size_; ++rank)
      if (!fault_.last_is_absent || rank != size_ - 1) start(rank);
  }

  /// To be called again and again. @return whether it is over
  bool go_on() {
    if (fault_.cut && !is_cut_ &&
        std::all_of(seen_, seen_ + size_, [](const Seen& seen) { return seen.ready.load(); })) {
      nodes_->cut_cable();
      struck_ns_ = now_ns();
      is_cut_ = true;
    }
    return over() || now_ns() > limit_ns_;
  }

  void judge(Outcome& outcome) const {
    std::int64_t struck = struck_ns_, last = 0;
    for (int rank = 0; rank < size_; ++rank) struck = std::max(struck, seen_[rank].struck_ns.load());
    int over = -1;
    for (int rank = 0; rank < size_; ++rank) {
      if (!waited_for(rank) || (fault_.last_is_absent && rank == size_ - 1)) continue;
      last = std::max(last, pids_[rank] > 0 ? now_ns() : ended_ns_[rank]);
      if (rank == culprit() && !fault_.culprit_names && !fault_.cut) continue;
      std::string problem = problem_of(rank);
      if (problem.empty() && seen_[rank].over >= 0 && over >= 0 && over != seen_[rank].over)
        problem = str("ended after ", seen_[rank].over.load(), " steps, another rank after ", over);
      over = std::max(over, seen_[rank].over.load());
      ++(problem.empty() ? outcome.right : outcome.wrong);
      if (!problem.empty())
        outcome.problems.push_back(str(fault_.name, ", rank ", rank, " of ", size_, ", culprit ", culprit(), ": ",
                                       problem, "; it said: ", seen_[rank].text));
    }
    outcome.seconds.push_back(static_cast<double>(last - struck) / 1e9);
  }

 private:
  int culprit() const {
    switch (fault_.culprit) {
      case Culprit::first:
        return 0;
      case Culprit::second:
        return 1;
      case Culprit::last:
        return size_ - 1;
      case Culprit::middle:
        break;
    }
    return size_ / 2;
  }
  int node_of(int rank) const { return rank < size_ / 2 ? 0 : 1; }
  bool waited_for(int rank) const { return fault_.cut || !fault_.silent || rank != culprit(); }

  void start(int rank) {
    pids_[rank] = forked([this, rank] { return be(rank); });
  }

  /// A process that runs `body`. @return its pid
  template <class Body>
  pid_t forked(const Body& body) const {
    std::fflush(nullptr);
    const pid_t parent = ::getpid();
    const pid_t pid = ::fork();  // without exec: LibTorch is loaded already, and has no threads yet
    if (pid < 0) throw std::runtime_error("no process to be had");
    if (pid > 0) return pid;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    if (!flags_.verbose && std::freopen("/dev/null", "w", stderr) == nullptr) ::_exit(1);
    ::_exit(body());
  }

  World world_of(int rank) const {
    World world;
    world.rank = rank;
    world.size = size_;
    world.local_size = nodes_ ? size_ / 2 : size_;
    world.local_rank = rank % world.local_size;
    if (nodes_) world.master_address = testing::TwoNodes::address(0);
    world.master_port = port_;
    world.run_id = std::to_string(seed_);
    return world;
  }

  /// In the process of the rank. @return its exit code
  int be(int rank) {
    Seen& seen = seen_[rank];
    Rank self;
    self.world = world_of(rank);
    self.options.timeout = fault_.short_timeout ? std::chrono::milliseconds(std::lround(flags_.timeout * 1e3)) : 60s;
    self.options.liveness = std::chrono::milliseconds(std::lround(flags_.liveness * 1e3));
    self.culprit = fault_.cut ? -1 : culprit();
    self.seed = seed_;
    self.seen = &seen;
    const auto note = [&](int named, const char* text) {
      std::strncpy(seen.text, text, sizeof seen.text - 1);
      seen.named = named;
    };
    try {
      if (nodes_) nodes_->enter(node_of(rank));
      if (fault_.told_by_launcher && node_of(rank) == node_of(culprit()))
        ::setenv("DUALPIPE_FAILED_FILE", failed_file().c_str(), 1);
      at::set_num_threads(1);
      fault_.body(self);
      return 0;
    } catch (const CommError& error) {
      note(error.origin_rank(), error.what());
    } catch (const std::exception& error) {
      note(rank, error.what());
    }
    return 1;
  }

  /// Whether all that are waited for have ended.
  bool over() {
    bool all = true;
    for (int rank = 0; rank < size_; ++rank) {
      if (pids_[rank] > 0 && ::waitpid(pids_[rank], nullptr, WNOHANG) == pids_[rank]) {
        pids_[rank] = -1;
        ended_ns_[rank] = now_ns();
        if (fault_.told_by_launcher && rank == culprit()) tell();
      }
      all = all && (pids_[rank] < 0 || !waited_for(rank));
    }
    return all;
  }

  std::string failed_file() const { return folder_ / "failed.json"; }
  /// As dualpipe-run does.
  void tell() {
    const dualpipe::detail::FailureReport failure{.message = "killed by SIGKILL (signal 9)",
                                                  .rank = culprit(),
                                                  .origin = culprit(),
                                                  .operation = {},
                                                  .time_ns = 0};
    dualpipe::detail::write_file(failed_file(), dualpipe::detail::to_json(failure));
    launcher_ = forked([&] {
      nodes_->enter(node_of(culprit()));
      const dualpipe::detail::StandIn stand_in(world_of(culprit()), {}, failure, 10s);
      while (!stand_in.is_over()) std::this_thread::sleep_for(1ms);
      return 0;
    });
  }

  std::string problem_of(int rank) const {
    const Seen& seen = seen_[rank];
    if (pids_[rank] > 0) return "it is still there";
    if (seen.named < 0) return "it ended without an error";
    const bool right =
        fault_.named_by_text || (fault_.cut ? node_of(seen.named) != node_of(rank) : seen.named == culprit());
    if (!right) return str("it named rank ", seen.named.load());
    for (std::string text : fault_.says) {
      const std::string place = "{culprit}";
      if (const auto at = text.find(place); at != std::string::npos)
        text.replace(at, place.size(), std::to_string(culprit()));
      if (std::strstr(seen.text, text.c_str()) == nullptr) return "it did not say '" + text + "'";
    }
    return {};
  }

  const Fault& fault_;
  int size_;
  std::uint32_t seed_;
  const Flags& flags_;
  pid_t launcher_ = -1;                 ///< that stands in for a rank
  std::vector<pid_t> pids_;             ///< by rank, -1: it has ended or was never started
  std::vector<std::int64_t> ended_ns_;  ///< by rank
  void* memory_ = nullptr;
  Seen* seen_ = nullptr;
  test::TemporaryFolder folder_;
  int port_ = 0;
  std::int64_t struck_ns_ = 0, limit_ns_ = 0;
  bool is_cut_ = false;
  std::unique_ptr<testing::TwoNodes> nodes_;
};

// ---- the table

std::string cells(Outcome& outcome) {
  if (outcome.seconds.empty()) return " - | - | - |";
  std::sort(outcome.seconds.begin(), outcome.seconds.end());
  char text[100];
  std::snprintf(text, sizeof text, " %d of %d | %.3f | %.3f |", outcome.right, outcome.right + outcome.wrong,
                outcome.seconds[outcome.seconds.size() / 2], outcome.seconds.back());
  return text;
}

/// One row, printed when it is known. @return whether all ranks named the culprit
bool measure(const Fault& fault, const Flags& flags) {
  std::string row = "| " + fault.name + " | " + fault.injected + " | " + fault.promise + " |";
  bool right = true;
  for (const int size : flags.ranks) {
    Outcome outcome;
    const bool waits = fault.short_timeout || fault.cut || fault.promise.starts_with("liveness");
    const std::size_t at_once = waits ? static_cast<std::size_t>(flags.at_once) : 1;
    std::vector<std::unique_ptr<Job>> jobs;
    for (int begun = 0; begun < flags.repetitions || !jobs.empty();) {
      if (begun < flags.repetitions && jobs.size() < at_once) {
        jobs.push_back(std::make_unique<Job>(fault, size, static_cast<std::uint32_t>(begun), flags));
        try {
          jobs.back()->start();
        } catch (const std::exception& error) {
          if (!fault.two_nodes) throw;
          std::fprintf(stderr, "\r\033[K%s is skipped: %s\n", fault.name.c_str(), error.what());
          return true;
        }
        ++begun;
        std::fprintf(stderr, "\r\033[K%s on %d ranks: %d of %d", fault.name.c_str(), size, begun, flags.repetitions);
      }
      std::erase_if(jobs, [&](const std::unique_ptr<Job>& job) {
        const bool over = job->go_on();
        if (over) job->judge(outcome);
        return over;
      });
      std::this_thread::sleep_for(500us);
    }
    std::fprintf(stderr, "\r\033[K");
    const std::size_t shown = std::min<std::size_t>(outcome.problems.size(), 3);
    for (std::size_t i = 0; i < shown; ++i) std::fprintf(stderr, "%s\n", outcome.problems[i].c_str());
    right = right && outcome.wrong == 0;
    row += cells(outcome);
  }
  std::printf("%s\n", row.c_str());
  std::fflush(stdout);
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    CLI::App app{"Whom ranks name when one fails, and how long it takes until all are out"};
    Flags flags;
    app.add_option("--ranks", flags.ranks, "sizes of the job")->capture_default_str()->check(CLI::Range(4, 64));
    app.add_option("--repetitions", flags.repetitions, "of each fault")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--fault", flags.faults, "names, see --list; without it all");
    app.add_option("--liveness", flags.liveness, "seconds after which a silent rank is given up")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--timeout", flags.timeout, "seconds, the deadline of faults that only a deadline finds")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--limit", flags.limit, "seconds after which a job is ended, and its ranks count as wrong")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_option("--at-once", flags.at_once, "repetitions side by side, of faults that are found by waiting")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_flag("--list", flags.list, "prints the faults");
    app.add_flag("--verbose", flags.verbose, "shows what ranks write to stderr");
    CLI11_PARSE(app, argc, argv);

    std::vector<Fault> faults = all_faults(flags);
    for (const std::string& name : flags.faults)
      DUALPIPE_CHECK(std::any_of(faults.begin(), faults.end(), [&](const Fault& fault) { return fault.name == name; }),
                     "there is no fault '", name, "'; --list prints them");
    if (!flags.faults.empty())
      std::erase_if(faults, [&](const Fault& fault) {
        return std::find(flags.faults.begin(), flags.faults.end(), fault.name) == flags.faults.end();
      });
    if (flags.list) {
      for (const Fault& fault : faults) std::printf("%-24s %s\n", fault.name.c_str(), fault.injected.c_str());
      return 0;
    }

    std::printf(
        "%d repetitions, liveness %s, timeout %s where the promise is one and 60 s elsewhere, %ld cores. Seconds until "
        "the last rank is out.\n\n",
        flags.repetitions, seconds_text(flags.liveness).c_str(), seconds_text(flags.timeout).c_str(),
        ::sysconf(_SC_NPROCESSORS_ONLN));
    std::string head = "| fault | injected | promise |", rule = "| --- | --- | --- |";
    for (const int size : flags.ranks) {
      head += str(" named right, ", size, " ranks | median | maximum |");
      rule += " --- | --- | --- |";
    }
    std::printf("%s\n%s\n", head.c_str(), rule.c_str());
    std::fflush(stdout);
    bool right = true;
    for (const Fault& fault : faults) right = measure(fault, flags) && right;
    return right ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
