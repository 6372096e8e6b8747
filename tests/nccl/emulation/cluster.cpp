#include "nccl/emulation/cluster.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace dualpipe::testing::emulation {
namespace {

/// Records a mismatch; the operation hangs until it is aborted.
void violate(Cluster& cluster, std::string what) { cluster.violations.push_back(std::move(what)); }

/// Completes pairs of the first send and the first receive between two ranks.
void meet(Cluster& cluster, Clique& clique, std::pair<int, int> edge) {
  auto& sends = clique.sends[edge];
  auto& receives = clique.receives[edge];
  while (!sends.empty() && !receives.empty()) {
    Part& send = *sends.front();
    Part& receive = *receives.front();
    if (send.bytes != receive.bytes) {
      violate(cluster, detail::str("rank ", edge.first, " sends ", send.bytes, " bytes to rank ", edge.second,
                                   ", which receives ", receive.bytes));
      return;
    }
    std::memcpy(receive.data, send.data, send.bytes);
    send.done = receive.done = true;
    sends.pop_front();
    receives.pop_front();
  }
}

at::Tensor view(const Part& part) {
  const auto count = static_cast<std::int64_t>(part.bytes / c10::elementSize(part.dtype));
  return at::from_blob(part.data, {count}, part.dtype);
}

/// Reduces as a ring does: each part of the tensor starts at another rank, so that no test relies on the order.
void reduce(const std::vector<Part*>& parts) {
  const c10::NoGradGuard no_grad;
  const auto size = static_cast<std::int64_t>(parts.size());
  const std::int64_t count = view(*parts[0]).numel();
  at::Tensor sum = at::empty({count}, parts[0]->dtype);
  const std::int64_t stretch = std::max<std::int64_t>(1, (count + size - 1) / size);
  for (std::int64_t begin = 0, first = 0; begin < count; begin += stretch, ++first) {
    const std::int64_t end = std::min(count, begin + stretch);
    at::Tensor into = sum.slice(0, begin, end);
    for (std::int64_t i = 0; i < size; ++i) {
      const at::Tensor part = view(*parts[static_cast<std::size_t>((first + i) % size)]).slice(0, begin, end);
      if (i == 0) {
        into.copy_(part);
      } else if (parts[0]->reduce == Reduce::sum) {
        into.add_(part);
      } else if (parts[0]->reduce == Reduce::max) {
        into.copy_(at::maximum(into, part));
      } else {
        into.copy_(at::minimum(into, part));
      }
    }
  }
  for (Part* part : parts) std::memcpy(part->data, sum.const_data_ptr(), part->bytes);
}

/// Performs a collective once its last rank has begun it.
void complete(Cluster& cluster, Clique& clique, std::uint64_t index) {
  std::vector<Part*>& parts = clique.collectives[index];
  if (parts.size() < clique.members.size()) return;
  std::sort(parts.begin(), parts.end(), [](const Part* a, const Part* b) { return a->owner < b->owner; });
  const Part& first = *parts[0];
  for (const Part* part : parts) {
    if (part->kind == first.kind && part->bytes == first.bytes && part->dtype == first.dtype &&
        part->reduce == first.reduce && part->peer == first.peer)
      continue;
    violate(cluster, detail::str("collective ", index, ": ranks ", first.owner, " and ", part->owner,
                                 " do not match: ", first.bytes, " and ", part->bytes, " bytes"));
    return;
  }
  if (first.kind == Part::Kind::all_reduce) {
    reduce(parts);
  } else {
    const Part& root = *parts[static_cast<std::size_t>(first.peer)];
    for (Part* part : parts)
      if (part != &root) std::memcpy(part->data, root.data, part->bytes);
  }
  for (Part* part : parts) part->done = true;
  clique.collectives.erase(index);
}

void begin(Cluster& cluster, Member& member, Part& part) {
  Clique& clique = *member.clique;
  if (part.kind == Part::Kind::send) {
    clique.sends[{part.owner, part.peer}].push_back(&part);
    meet(cluster, clique, {part.owner, part.peer});
  } else if (part.kind == Part::Kind::receive) {
    clique.receives[{part.peer, part.owner}].push_back(&part);
    meet(cluster, clique, {part.peer, part.owner});
  } else {
    clique.collectives[part.index].push_back(&part);
    complete(cluster, clique, part.index);
  }
}

/// Removes a part that has begun and is aborted.
void withdraw(Member& member, Part& part) {
  Clique& clique = *member.clique;
  if (part.kind == Part::Kind::send) std::erase(clique.sends[{part.owner, part.peer}], &part);
  if (part.kind == Part::Kind::receive) std::erase(clique.receives[{part.peer, part.owner}], &part);
  if (!part.between_two()) std::erase(clique.collectives[part.index], &part);
}

}  // namespace

void perform(Cluster& cluster, Member& member, Operation& operation) {
  std::unique_lock lock(cluster.mutex);
  const auto gone = [&] { return member.aborted || cluster.stopped; };
  cluster.changed.wait(lock, [&] { return gone() || member.running == operation.turn; });
  const bool alone =
      cluster.options.one_transfer_at_a_time &&
      std::any_of(operation.parts.begin(), operation.parts.end(), [](const Part& part) { return part.between_two(); });
  const auto device = static_cast<std::size_t>(member.device);
  if (alone) {
    cluster.changed.wait(lock, [&] { return gone() || !cluster.occupied[device]; });
    if (!gone()) cluster.occupied[device] = true;
  }
  if (!gone()) {
    for (Part& part : operation.parts) begin(cluster, member, part);
    cluster.changed.notify_all();
    ++cluster.waiting[device];
    cluster.changed.wait(lock, [&] {
      return gone() ||
             std::all_of(operation.parts.begin(), operation.parts.end(), [](const Part& part) { return part.done; });
    });
    --cluster.waiting[device];
    for (Part& part : operation.parts)
      if (!part.done) withdraw(member, part);
    if (alone) cluster.occupied[device] = false;
  }
  member.running = std::max(member.running, operation.turn + 1);
  ++member.finished;
  cluster.changed.notify_all();
}

Stream::Stream(Cluster& cluster, int rank, bool on_host) : cluster_(cluster), rank_(rank), on_host_(on_host) {
  {
    const std::lock_guard lock(cluster.mutex);
    id_ = ++cluster.streams;
    random_.seed(cluster.options.seed * 1000003 + id_ * 1009 + static_cast<std::uint64_t>(rank));
  }
  if (on_host_) return;
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "stream");
    work();
  });
}

Stream::~Stream() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Stream::enqueue(std::function<void()> task) {
  if (on_host_) return task();
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_all();
}

void Stream::synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return tasks_.empty() && !busy_; });
}

void Stream::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    busy_ = true;
    lock.unlock();
    delay();
    task();
    task = nullptr;  // frees memory, which may enqueue a task here
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

void Stream::delay() {
  const auto most = cluster_.options.longest_delay.count();
  if (most <= 0 || random_() % 4 != 0) return;
  std::this_thread::sleep_for(std::chrono::microseconds(random_() % static_cast<std::uint64_t>(most)));
}

}  // namespace dualpipe::testing::emulation
