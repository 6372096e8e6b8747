#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "nccl/emulation/nccl_emulation.hpp"

// The state behind NcclEmulation. Cluster::mutex guards everything except where a comment names another mutex.
namespace dualpipe::testing::emulation {

struct Clique;
struct Cluster;

struct EventState {
  std::uint64_t recorded = 0;
  std::uint64_t completed = 0;
  double time = 0;
};

/// One send, receive or collective.
struct Part {
  enum class Kind { send, receive, broadcast, all_reduce };
  Kind kind = Kind::send;
  void* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;  ///< or root
  at::ScalarType dtype = at::kByte;
  Reduce reduce = Reduce::sum;
  int owner = 0;            ///< rank in the clique
  std::uint64_t index = 0;  ///< of a collective, in its communicator
  bool done = false;

  bool between_two() const { return kind == Kind::send || kind == Kind::receive; }
};

/// One launch; its parts progress independently.
struct Operation {
  std::vector<Part> parts;
  std::uint64_t turn = 0;
};

/// One rank's handle of a communicator.
struct Member : std::enable_shared_from_this<Member> {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  int device = 0;
  std::uint64_t launched = 0;
  std::uint64_t running = 0;  ///< turn of the operation that may run
  std::uint64_t finished = 0;
  std::uint64_t collectives = 0;
  bool aborted = false;
  bool leaving = false;
  std::string name;
  std::set<std::string> connected;  ///< algorithms and peers
};

/// A communicator, with all its ranks.
struct Clique {
  std::vector<Member*> members;  ///< by rank; null: not yet opened. Cluster::members holds them
  /// Parts that have begun and wait for the other end, by sender and receiver.
  std::map<std::pair<int, int>, std::deque<Part*>> sends, receives;
  std::map<std::uint64_t, std::vector<Part*>> collectives;
};

/// A caching allocator: memory is reused by stream and size, last in, first out. Fresh memory holds 0xFF (NaN), and the
/// caller overwrites freed memory with it in stream order. Nothing is returned to the system, so that a use at the
/// wrong time reads poison or another tensor's values, and never faults.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* allocate(std::uint64_t stream, std::size_t bytes);
  void free(std::uint64_t stream, void* data);
  static std::size_t rounded(std::size_t bytes) { return bytes < 64 ? 64 : (bytes + 63) / 64 * 64; }

 private:
  std::mutex mutex_;
  std::map<std::pair<std::uint64_t, std::size_t>, std::vector<void*>> free_;
  std::map<void*, std::size_t> sizes_;
};

/// A queue of tasks with a thread; or the host, which runs each task within enqueue().
class Stream {
 public:
  Stream(Cluster& cluster, int rank, bool on_host);
  ~Stream();
  /// Any thread, without Cluster::mutex.
  void enqueue(std::function<void()> task);
  void synchronize();
  std::uint64_t id() const { return id_; }
  int rank() const { return rank_; }

 private:
  void work();
  void delay();

  Cluster& cluster_;
  const int rank_;
  const bool on_host_;
  std::uint64_t id_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool busy_ = false;
  bool stop_ = false;
  std::mt19937_64 random_;
  std::thread thread_;
};

/// All ranks behind one mutex: the emulation is about order, not about speed.
struct Cluster {
  Cluster(int num_ranks, const NcclEmulation::Options& with)
      : options(with),
        occupied(static_cast<std::size_t>(num_ranks), false),
        loading(static_cast<std::size_t>(num_ranks), false),
        waiting(static_cast<std::size_t>(num_ranks), 0),
        beside_waiting(static_cast<std::size_t>(num_ranks), 0),
        flag_uses(static_cast<std::size_t>(num_ranks), 0),
        communicators(static_cast<std::size_t>(num_ranks)),
        connections(static_cast<std::size_t>(num_ranks)) {}

  const NcclEmulation::Options options;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<bool> occupied;       ///< by device: performs a transfer
  std::vector<bool> loading;        ///< by device: loads code, and its context is locked
  std::vector<int> waiting;         ///< by device: operations that have begun and wait for other ranks
  std::vector<int> beside_waiting;  ///< by device: kernels that have begun meanwhile
  std::vector<int> flag_uses;       ///< by device: writes and waits of flags that are queued
  std::vector<std::vector<std::string>> communicators;  ///< by rank: names
  std::vector<std::vector<std::string>> connections;    ///< by rank
  std::uint64_t ids = 0;
  std::uint64_t streams = 0;
  std::size_t open_streams = 0;
  std::map<std::uint64_t, std::shared_ptr<Clique>> cliques;
  std::set<Member*> valid;
  std::vector<std::shared_ptr<Member>> members;  ///< all that were ever opened
  std::map<int, std::string> broken;
  std::vector<std::string> violations;
  std::vector<std::unique_ptr<Stream>> retired;
  std::map<std::uint64_t, Stream*> alive;  ///< by id
  std::vector<std::shared_ptr<void>> leaked_flags;
  Memory memory;
  bool stopped = false;
};

struct Event {
  Event(std::shared_ptr<Cluster> of, bool with_time) : cluster(std::move(of)), timed(with_time) {}
  const std::shared_ptr<Cluster> cluster;
  const bool timed;
  const std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

/// Runs an operation on the thread of its stream; returns when it has finished or is aborted.
void perform(Cluster& cluster, Member& member, Operation& operation);

}  // namespace dualpipe::testing::emulation
