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

// What NcclEmulation is made of. Everything is guarded by World::mutex, except where it says otherwise.
namespace dualpipe::testing::emulation {

struct Clique;
struct World;

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

/// What one launch does: its parts progress independently of each other.
struct Operation {
  std::vector<Part> parts;
  std::uint64_t turn = 0;
};

/// One rank of a communicator.
struct Member : std::enable_shared_from_this<Member> {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  int device = 0;
  std::uint64_t launched = 0;
  std::uint64_t running = 0;  ///< the turn that may run
  std::uint64_t over = 0;     ///< how many of those launched are over
  std::uint64_t collectives = 0;
  bool aborted = false;
  bool leaving = false;
};

struct Clique {
  std::vector<std::shared_ptr<Member>> members;
  /// What has begun and not met its other end, by sender and receiver.
  std::map<std::pair<int, int>, std::deque<Part*>> sends, receives;
  std::map<std::uint64_t, std::vector<Part*>> collectives;
};

/// Gives back first what came back last, by stream and size, as a caching allocator does. What comes back may be given
/// out again at once, for work of the same stream; it is overwritten with 0xFF (NaN) when the stream comes to it.
/// Nothing is returned to the system: who uses memory too late or too early reads poison, or somebody else's values.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* take(std::uint64_t stream, std::size_t bytes);
  /// Without the poison.
  void give_back(std::uint64_t stream, void* data);
  static std::size_t rounded(std::size_t bytes) { return bytes < 64 ? 64 : (bytes + 63) / 64 * 64; }

 private:
  std::mutex mutex_;  // of its own
  std::map<std::pair<std::uint64_t, std::size_t>, std::vector<void*>> free_;
  std::map<void*, std::size_t> sizes_;
};

/// A queue on a thread of its own, or the host: then what is given is done before give() returns.
class Stream {
 public:
  Stream(World& world, int rank, bool on_host);
  ~Stream();
  /// Any thread, without World::mutex.
  void give(std::function<void()> task);
  void synchronize();
  std::uint64_t id() const { return id_; }

 private:
  void work();
  void delay();

  World& world_;
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

struct World {
  World(int num_ranks, std::chrono::microseconds longest, std::uint64_t first_seed)
      : longest_delay(longest), seed(first_seed), occupied(static_cast<std::size_t>(num_ranks), false) {}

  const std::chrono::microseconds longest_delay;
  const std::uint64_t seed;
  std::mutex mutex;
  std::condition_variable changed;
  bool one_transfer_at_a_time = false;
  std::chrono::milliseconds patience{};
  std::vector<bool> occupied;  ///< by device: performs a transfer
  std::uint64_t ids = 0;
  std::uint64_t streams = 0;
  std::size_t open_streams = 0;
  std::map<std::uint64_t, std::shared_ptr<Clique>> cliques;
  std::set<Member*> valid;
  std::map<int, std::string> broken;
  std::vector<std::string> violations;
  std::vector<std::unique_ptr<Stream>> retired;
  std::map<std::uint64_t, Stream*> alive;  ///< by id
  Memory memory;
  bool over = false;
};

struct Event {
  Event(std::shared_ptr<World> of, bool with_time) : world(std::move(of)), timed(with_time) {}
  const std::shared_ptr<World> world;
  const bool timed;
  const std::shared_ptr<EventState> state = std::make_shared<EventState>();
};

/// Runs an operation on the thread of its stream; returns when it is over or aborted.
void perform(World& world, Member& member, Operation& operation);

}  // namespace dualpipe::testing::emulation
