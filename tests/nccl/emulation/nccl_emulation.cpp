#include "nccl/emulation/nccl_emulation.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "nccl/emulation/cluster.hpp"

namespace dualpipe::testing {
namespace {

using detail::DeviceEvent;
using detail::DeviceFailure;
using detail::DeviceStream;
using detail::NcclComm;
using emulation::Clique;
using emulation::Cluster;
using emulation::Event;
using emulation::Member;
using emulation::Operation;
using emulation::Part;
using emulation::Stream;

Stream* real(DeviceStream stream) { return reinterpret_cast<Stream*>(stream); }
Event* real(DeviceEvent event) { return reinterpret_cast<Event*>(event); }
Member* real(NcclComm comm) { return reinterpret_cast<Member*>(comm); }

/// Waits while another call holds the context's lock.
void enter_context(Cluster& cluster, int rank) {
  std::unique_lock lock(cluster.mutex);
  const auto free = [&] { return cluster.stopped || !cluster.loading[static_cast<std::size_t>(rank)]; };
  if (!cluster.changed.wait_for(lock, cluster.options.patience, free))
    cluster.violations.push_back("a call of the device waits for code that is loaded");
}

}  // namespace

class NcclEmulation::Device final : public detail::DeviceApi {
 public:
  Device(std::shared_ptr<Cluster> cluster, int rank)
      : cluster_(std::move(cluster)), rank_(rank), host_(std::make_unique<Stream>(*cluster_, rank, /*on_host=*/true)) {}

  at::Device device() const override { return at::kCPU; }
  DeviceStream current_stream() override {
    const std::lock_guard lock(cluster_->mutex);
    return reinterpret_cast<DeviceStream>(current_ ? current_ : host_.get());
  }
  void set_current(Stream* stream) {
    const std::lock_guard lock(cluster_->mutex);
    current_ = stream;
  }
  DeviceStream create_stream() override {
    enter_context(*cluster_, rank_);
    auto stream = std::make_unique<Stream>(*cluster_, rank_, /*on_host=*/false);
    const std::lock_guard lock(cluster_->mutex);
    ++cluster_->open_streams;
    cluster_->alive[stream->id()] = stream.get();
    streams_.push_back(std::move(stream));
    return reinterpret_cast<DeviceStream>(streams_.back().get());
  }
  void destroy(DeviceStream stream) noexcept override {
    const std::lock_guard lock(cluster_->mutex);
    const auto found =
        std::find_if(streams_.begin(), streams_.end(), [&](const auto& each) { return each.get() == real(stream); });
    if (found == streams_.end()) {
      cluster_->violations.push_back("a stream was destroyed that does not exist");
      return;
    }
    // As in CUDA, the stream ends when its tasks have.
    cluster_->alive.erase((*found)->id());
    cluster_->retired.push_back(std::move(*found));
    streams_.erase(found);
    --cluster_->open_streams;
  }

  DeviceEvent create_event(bool timed) override {
    enter_context(*cluster_, rank_);
    return reinterpret_cast<DeviceEvent>(new Event(cluster_, timed));
  }
  void destroy(DeviceEvent event) noexcept override { delete real(event); }

  void record(DeviceEvent event, DeviceStream stream) override {
    enter_context(*cluster_, rank_);
    const auto state = real(event)->state;
    std::uint64_t generation = 0;
    {
      const std::lock_guard lock(cluster_->mutex);
      generation = ++state->recorded;
    }
    real(stream)->enqueue([cluster = cluster_.get(), state, generation] {
      {
        const std::lock_guard lock(cluster->mutex);
        state->completed = std::max(state->completed, generation);
        state->time = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
      }
      cluster->changed.notify_all();
    });
  }

  void wait(DeviceStream stream, DeviceEvent event) override {
    enter_context(*cluster_, rank_);
    const auto state = real(event)->state;
    std::uint64_t generation = 0;
    {
      const std::lock_guard lock(cluster_->mutex);
      generation = state->recorded;
    }
    real(stream)->enqueue([cluster = cluster_.get(), state, generation] {
      std::unique_lock lock(cluster->mutex);
      cluster->changed.wait(lock, [&] { return state->completed >= generation || cluster->stopped; });
    });
  }

  bool done(DeviceEvent event) override {
    enter_context(*cluster_, rank_);
    const std::lock_guard lock(cluster_->mutex);
    return real(event)->state->completed >= real(event)->state->recorded;
  }

  double time_of(DeviceEvent event) override {
    enter_context(*cluster_, rank_);
    const std::lock_guard lock(cluster_->mutex);
    if (!real(event)->timed) cluster_->violations.push_back("an event was asked for its time that has none");
    return real(event)->state->time;
  }

  std::shared_ptr<detail::DeviceFlag[]> create_flags(std::size_t count) override {
    enter_context(*cluster_, rank_);
    const auto memory = std::make_shared<std::vector<detail::DeviceFlag>>(count);
    return {memory->data(), [memory, cluster = cluster_, device = device_index()](detail::DeviceFlag*) {
              std::unique_lock lock(cluster->mutex);
              const auto unused = [&] { return cluster->flag_uses[device] == 0; };
              if (cluster->changed.wait_for(lock, cluster->options.patience, unused)) return;
              cluster->violations.push_back("flags are freed for which a stream waits");
              cluster->leaked_flags.push_back(memory);
            }};
  }
  void write_flag(DeviceStream stream, detail::DeviceFlag& flag, std::uint32_t value) override {
    use_flag(stream, [&flag, value] {
      flag = value;
      return true;
    });
  }
  void wait_for_flag(DeviceStream stream, const detail::DeviceFlag& flag, std::uint32_t value) override {
    use_flag(stream, [&flag, value] { return static_cast<std::int32_t>(flag - value) >= 0; });
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, DeviceStream stream) override {
    if (real(stream) == host_.get()) return at::empty(sizes, dtype);
    const std::uint64_t id = real(stream)->id();
    const std::size_t bytes = static_cast<std::size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
    if (bytes == 0) return at::empty(sizes, dtype);
    return at::from_blob(
        cluster_->memory.allocate(id, bytes), sizes,
        [cluster = cluster_, id, bytes](void* data) {
          {
            const std::lock_guard lock(cluster->mutex);
            const auto owner = cluster->alive.find(id);
            if (owner != cluster->alive.end())
              owner->second->enqueue([data, bytes] { std::memset(data, 0xFF, bytes); });
          }
          cluster->memory.free(id, data);
        },
        at::dtype(dtype));
  }

  void copy(const at::Tensor& to, const at::Tensor& from, DeviceStream stream) override {
    enter_context(*cluster_, rank_);
    // Keeps neither tensor alive, as a device does not.
    real(stream)->enqueue([into = to.mutable_data_ptr(), data = from.const_data_ptr(), bytes = to.nbytes()] {
      std::memcpy(into, data, bytes);
    });
  }

  void push_range(const std::string& name) override {
    const std::lock_guard lock(cluster_->mutex);
    ranges_.push_back(std::string(2 * static_cast<std::size_t>(open_ranges_[std::this_thread::get_id()]++), ' ') +
                      name);
  }
  void pop_range() override {
    const std::lock_guard lock(cluster_->mutex);
    if (--open_ranges_[std::this_thread::get_id()] < 0)
      cluster_->violations.push_back("a range ended that had not begun");
  }
  std::vector<std::string> ranges() const {
    const std::lock_guard lock(cluster_->mutex);
    return ranges_;
  }

 private:
  std::size_t device_index() const { return static_cast<std::size_t>(rank_); }
  /// Queues a task that repeats `done` until it is true.
  template <class Done>
  void use_flag(DeviceStream stream, const Done& done) {
    enter_context(*cluster_, rank_);
    {
      const std::lock_guard lock(cluster_->mutex);
      ++cluster_->flag_uses[device_index()];
    }
    real(stream)->enqueue([cluster = cluster_.get(), device = device_index(), done] {
      std::unique_lock lock(cluster->mutex);
      // Nobody tells the device of a write by the host.
      while (!done() && !cluster->stopped) cluster->changed.wait_for(lock, std::chrono::microseconds(100));
      --cluster->flag_uses[device];
      cluster->changed.notify_all();
    });
  }

  std::shared_ptr<Cluster> cluster_;
  const int rank_;
  std::unique_ptr<Stream> host_;
  std::vector<std::unique_ptr<Stream>> streams_;
  Stream* current_ = nullptr;
  std::vector<std::string> ranges_;
  std::map<std::thread::id, int> open_ranges_;
};

class NcclEmulation::Nccl final : public detail::NcclApi {
 public:
  Nccl(std::shared_ptr<Cluster> cluster, int rank) : cluster_(std::move(cluster)), rank_(rank) {}

  detail::NcclId unique_id() override {
    const std::lock_guard lock(cluster_->mutex);
    detail::NcclId id{};
    const std::uint64_t number = ++cluster_->ids;
    std::memcpy(id.data(), &number, sizeof number);
    return id;
  }

  NcclComm init(int num_ranks, const detail::NcclId& id, int rank, const detail::NcclConfig& config) override {
    std::unique_lock lock(cluster_->mutex);
    std::uint64_t number = 0;
    std::memcpy(&number, id.data(), sizeof number);
    auto& clique = cluster_->cliques[number];
    if (!clique) {
      clique = std::make_shared<Clique>();
      clique->members.resize(static_cast<std::size_t>(num_ranks));
    }
    if (rank < 0 || rank >= num_ranks || clique->members.size() != static_cast<std::size_t>(num_ranks))
      throw DeviceFailure("init: ranks disagree about their number");
    Member*& member = clique->members[static_cast<std::size_t>(rank)];
    if (member != nullptr) throw DeviceFailure("init: this rank exists already");
    member = cluster_->members.emplace_back(std::make_shared<Member>()).get();
    member->clique = clique;
    member->rank = rank;
    member->device = rank_;
    member->name = config.name;
    cluster_->communicators[static_cast<std::size_t>(rank_)].push_back(config.name);
    cluster_->changed.notify_all();
    const bool complete = cluster_->changed.wait_for(lock, cluster_->options.patience, [&] {
      return std::all_of(clique->members.begin(), clique->members.end(),
                         [](const Member* each) { return each != nullptr; });
    });
    if (!complete) throw DeviceFailure("init: some ranks never came");
    cluster_->valid.insert(member);
    return reinterpret_cast<NcclComm>(member);
  }

  void destroy(NcclComm comm) override {
    std::unique_lock lock(cluster_->mutex);
    Member* member = use(comm, "destroy");
    if (member == nullptr) return;
    member->leaving = true;
    cluster_->valid.erase(member);
    cluster_->changed.notify_all();
    const auto over = [&] {
      return member->running == member->launched &&
             std::all_of(member->clique->members.begin(), member->clique->members.end(),
                         [](const auto& each) { return each->leaving || each->aborted; });
    };
    if (!cluster_->changed.wait_for(lock, cluster_->options.patience, over))
      cluster_->violations.push_back("destroy hangs: other ranks do not destroy theirs");
  }

  void abort(std::span<const NcclComm> comms) noexcept override {
    std::unique_lock lock(cluster_->mutex);
    std::vector<std::shared_ptr<Member>> members;
    for (const NcclComm comm : comms) {
      Member* member = use(comm, "abort");
      if (member == nullptr) continue;
      member->aborted = true;
      cluster_->valid.erase(member);
      members.push_back(member->shared_from_this());
    }
    cluster_->changed.notify_all();
    const bool ended = cluster_->changed.wait_for(lock, cluster_->options.patience, [&] {
      return std::all_of(members.begin(), members.end(),
                         [](const auto& member) { return member->finished == member->launched; });
    });
    if (!ended) cluster_->violations.push_back("abort hangs: what was launched waits for what is not aborted");
  }

  std::optional<std::string> async_error(NcclComm comm) override {
    const std::lock_guard lock(cluster_->mutex);
    if (use(comm, "async_error") == nullptr) return std::nullopt;
    const auto found = cluster_->broken.find(rank_);
    return found == cluster_->broken.end() ? std::nullopt : std::optional(found->second);
  }

  void group_start() override {
    const std::lock_guard lock(cluster_->mutex);
    Group& group = groups_[std::this_thread::get_id()];
    ++group.depth;
  }
  void group_end() override {
    std::unique_lock lock(cluster_->mutex);
    Group& group = groups_[std::this_thread::get_id()];
    if (group.depth == 0) {
      cluster_->violations.push_back("a group ended that had not begun");
      return;
    }
    if (--group.depth > 0 || group.parts.empty()) return;
    std::vector<Part> parts = std::move(group.parts);
    group.parts.clear();
    launch(std::move(lock), std::move(parts), group.member, group.stream);
  }

  void send(const void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) override {
    add({.kind = Part::Kind::send, .data = const_cast<void*>(data), .bytes = bytes, .peer = peer}, comm, stream);
  }
  void receive(void* data, std::size_t bytes, int peer, NcclComm comm, DeviceStream stream) override {
    add({.kind = Part::Kind::receive, .data = data, .bytes = bytes, .peer = peer}, comm, stream);
  }
  void broadcast(void* data, std::size_t bytes, int root, NcclComm comm, DeviceStream stream) override {
    add({.kind = Part::Kind::broadcast, .data = data, .bytes = bytes, .peer = root}, comm, stream);
  }
  void all_reduce(void* data, std::size_t count, at::ScalarType dtype, Reduce reduce, NcclComm comm,
                  DeviceStream stream) override {
    add({.kind = Part::Kind::all_reduce,
         .data = data,
         .bytes = count * c10::elementSize(dtype),
         .dtype = dtype,
         .reduce = reduce},
        comm, stream);
  }

 private:
  struct Group {
    int depth = 0;
    std::vector<Part> parts;
    Member* member = nullptr;
    Stream* stream = nullptr;
  };

  /// The member behind a handle; null, and a violation, if it has ended.
  Member* use(NcclComm comm, const char* call) {
    if (cluster_->valid.contains(real(comm))) return real(comm);
    cluster_->violations.push_back(detail::str(call, ": rank ", rank_, " uses a communicator after its end"));
    return nullptr;
  }

  void add(Part part, NcclComm comm, DeviceStream stream) {
    std::unique_lock lock(cluster_->mutex);
    Member* member = use(comm, "launch");
    if (member == nullptr) throw DeviceFailure("the communicator was aborted");
    if (part.peer < 0 || part.peer >= static_cast<int>(member->clique->members.size()))
      throw DeviceFailure(detail::str("there is no rank ", part.peer));
    if (part.bytes == 0) cluster_->violations.push_back("an operation of no bytes was launched");
    Group& group = groups_[std::this_thread::get_id()];
    if (group.depth == 0) return launch(std::move(lock), {part}, member, real(stream));
    if (!group.parts.empty() && (group.member != member || group.stream != real(stream)))
      cluster_->violations.push_back("a group spans two communicators or streams, which is not emulated");
    group.member = member;
    group.stream = real(stream);
    group.parts.push_back(part);
  }

  void launch(std::unique_lock<std::mutex> lock, std::vector<Part> parts, Member* member, Stream* stream) {
    if (parts.size() > 256) cluster_->violations.push_back("a group of more than 256 operations can hang");
    auto operation = std::make_shared<Operation>();
    operation->parts = std::move(parts);
    operation->turn = member->launched++;
    for (Part& part : operation->parts) {
      part.owner = member->rank;
      if (!part.between_two()) part.index = member->collectives++;
      connect(*member, part);
    }
    lock.unlock();
    stream->enqueue([cluster = cluster_.get(), operation, owner = member->shared_from_this()] {
      emulation::perform(*cluster, *owner, *operation);
    });
  }

  /// Notes what NCCL would have to connect for this part.
  void connect(Member& member, const Part& part) const {
    constexpr std::size_t largest_small = 64 << 10;
    const char* size = part.bytes <= largest_small ? "small" : "large";
    std::string what;
    if (part.between_two()) {
      what = detail::str(part.kind == Part::Kind::send ? "send to " : "receive from ", part.peer);
    } else {
      what = detail::str(size, part.kind == Part::Kind::all_reduce ? " all_reduce" : " broadcast");
    }
    if (member.connected.insert(what).second)
      cluster_->connections[static_cast<std::size_t>(rank_)].push_back(detail::str(member.name, ": ", what));
  }

  std::shared_ptr<Cluster> cluster_;
  const int rank_;
  std::map<std::thread::id, Group> groups_;
};

NcclEmulation::NcclEmulation(int num_ranks, const Options& options)
    : cluster_(std::make_shared<Cluster>(num_ranks, options)) {
  for (int r = 0; r < num_ranks; ++r) {
    devices_.push_back(std::make_shared<Device>(cluster_, r));
    nccls_.push_back(std::make_shared<Nccl>(cluster_, r));
  }
}

NcclEmulation::~NcclEmulation() {
  {
    const std::lock_guard lock(cluster_->mutex);
    cluster_->stopped = true;
  }
  cluster_->changed.notify_all();
  cluster_->retired.clear();
}

std::shared_ptr<detail::DeviceApi> NcclEmulation::device(int rank) const {
  return devices_.at(static_cast<std::size_t>(rank));
}
std::shared_ptr<detail::NcclApi> NcclEmulation::nccl(int rank) const {
  return nccls_.at(static_cast<std::size_t>(rank));
}
void NcclEmulation::set_current(int rank, DeviceStream stream) const {
  devices_.at(static_cast<std::size_t>(rank))->set_current(real(stream));
}
void NcclEmulation::run(DeviceStream stream, std::function<void()> kernel) const {
  const auto device = static_cast<std::size_t>(real(stream)->rank());
  real(stream)->enqueue([cluster = cluster_.get(), device, kernel = std::move(kernel)] {
    {
      const std::lock_guard lock(cluster->mutex);
      if (cluster->waiting[device] > 0) ++cluster->beside_waiting[device];
    }
    kernel();
  });
}
int NcclEmulation::kernels_beside_waiting(int rank) const {
  const std::lock_guard lock(cluster_->mutex);
  return cluster_->beside_waiting.at(static_cast<std::size_t>(rank));
}
void NcclEmulation::synchronize(DeviceStream stream) const { real(stream)->synchronize(); }

void NcclEmulation::load_code(int rank) const {
  std::unique_lock lock(cluster_->mutex);
  const auto at = static_cast<std::size_t>(rank);
  cluster_->loading[at] = true;
  const auto idle = [&] {
    return std::all_of(cluster_->members.begin(), cluster_->members.end(), [&](const auto& member) {
      return member->device != rank || member->finished == member->launched;
    });
  };
  if (!cluster_->changed.wait_for(lock, cluster_->options.patience, idle))
    cluster_->violations.push_back("code is not loaded: an operation does not end");
  cluster_->loading[at] = false;
  cluster_->changed.notify_all();
}

void NcclEmulation::break_down(int rank, const std::string& error) const {
  const std::lock_guard lock(cluster_->mutex);
  cluster_->broken[rank] = error;
}
std::vector<std::string> NcclEmulation::violations() const {
  const std::lock_guard lock(cluster_->mutex);
  return cluster_->violations;
}
std::vector<std::string> NcclEmulation::ranges(int rank) const {
  return devices_.at(static_cast<std::size_t>(rank))->ranges();
}
std::size_t NcclEmulation::open_streams() const {
  const std::lock_guard lock(cluster_->mutex);
  return cluster_->open_streams;
}

std::vector<std::string> NcclEmulation::communicators(int rank) const {
  const std::lock_guard lock(cluster_->mutex);
  return cluster_->communicators.at(static_cast<std::size_t>(rank));
}
std::vector<std::string> NcclEmulation::connections(int rank) const {
  const std::lock_guard lock(cluster_->mutex);
  return cluster_->connections.at(static_cast<std::size_t>(rank));
}

}  // namespace dualpipe::testing
