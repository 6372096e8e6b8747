#include "comm/late_device.hpp"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

namespace dualpipe::test {
namespace {

/// For each time that it was recorded: whether the stream has reached it.
using Event = std::vector<bool>;

struct Task {
  std::function<bool()> ready;  ///< null: at once
  std::function<void()> run;
};

class Device {
 public:
  static Device& get() {
    static Device device;
    return device;
  }

  void restart(std::uint64_t seed) {
    const std::lock_guard lock(mutex_);
    streams_.clear();
    random_.seed(seed);
  }
  c10::StreamId new_stream() {
    const std::lock_guard lock(mutex_);
    return ++last_stream_;
  }

  void enqueue(c10::StreamId stream, Task task) {
    const std::lock_guard lock(mutex_);
    streams_[stream].push_back(std::move(task));
  }

  void record(Event& event, c10::StreamId stream) {
    const std::lock_guard lock(mutex_);
    streams_[stream].push_back({nullptr, [&event, number = event.size()] { event[number] = true; }});
    event.push_back(false);
  }
  void block(Event& event, c10::StreamId stream) {
    const std::lock_guard lock(mutex_);
    streams_[stream].push_back({[&event, number = event.size() - 1] { return event[number]; }, [] {}});
  }
  void wait_for_events(bool waits) {
    const std::lock_guard lock(mutex_);
    waits_for_events_ = waits;
  }
  bool waits_for_events() {
    const std::lock_guard lock(mutex_);
    return waits_for_events_;
  }
  int host_waits() {
    const std::lock_guard lock(mutex_);
    return std::exchange(host_waits_, 0);
  }
  bool over(const Event& event) {
    const std::lock_guard lock(mutex_);
    return event.back();
  }

  /// Runs queued work in any permitted order until `wanted` holds.
  void run_until(const std::function<bool()>& wanted) {
    const std::lock_guard lock(mutex_);
    ++host_waits_;
    while (!wanted()) {
      std::vector<std::deque<Task>*> able;
      for (auto& [id, tasks] : streams_)
        if (!tasks.empty() && (!tasks.front().ready || tasks.front().ready())) able.push_back(&tasks);
      TORCH_CHECK(!able.empty(), "every stream waits for an event of another one");
      std::deque<Task>& chosen = *able[random_() % able.size()];
      const Task task = std::move(chosen.front());
      chosen.pop_front();
      task.run();
    }
  }
  void run_all() {
    run_until([this] {
      return std::all_of(streams_.begin(), streams_.end(), [](const auto& stream) { return stream.second.empty(); });
    });
  }
  void run_stream(c10::StreamId id) {
    run_until([this, id] { return streams_[id].empty(); });
  }

  Event* keep(std::unique_ptr<Event> event) {
    const std::lock_guard lock(mutex_);
    return events_.emplace_back(std::move(event)).get();
  }
  char* allocate(std::size_t bytes, c10::StreamId stream) {
    const std::lock_guard lock(mutex_);
    std::vector<char*>& free = free_[{stream, bytes}];
    if (free.empty()) return memory_.emplace_back(new char[std::max<std::size_t>(bytes, 1)]).get();
    char* block = free.back();
    free.pop_back();
    return block;
  }
  void give_back(char* block, std::size_t bytes, c10::StreamId stream) {
    const std::lock_guard lock(mutex_);
    streams_[stream].push_back({nullptr, [block, bytes] { std::memset(block, 0xcb, bytes); }});
    free_[{stream, bytes}].push_back(block);
  }

 private:
  std::mutex mutex_;
  std::mt19937_64 random_;
  c10::StreamId last_stream_ = 0;
  int host_waits_ = 0;
  bool waits_for_events_ = true;
  std::map<c10::StreamId, std::deque<Task>> streams_;
  std::map<std::pair<c10::StreamId, std::size_t>, std::vector<char*>> free_;
  std::vector<std::unique_ptr<char[]>> memory_;  // never freed: late reads are wrong, not crashes
  std::vector<std::unique_ptr<Event>> events_;   // tasks refer to them
};

thread_local c10::StreamId current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return late_device.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return late_device; }
  c10::Device getDevice() const override { return late_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, late_device, current); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return c10::Stream(c10::Stream::UNSAFE, late_device, std::exchange(current, stream.id()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = Device::get().keep(std::make_unique<Event>());
    Device::get().record(*static_cast<Event*>(*event), stream.id());
  }
  void block(void* event, const c10::Stream& stream) const override {
    Device::get().block(*static_cast<Event*>(event), stream.id());
  }
  bool queryEvent(void* event) const override { return Device::get().over(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (Device::get().waits_for_events())
      Device::get().run_until([event = static_cast<Event*>(event)] { return event->back(); });
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Block {
  char* data;
  std::size_t bytes;
  c10::StreamId home;
  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    Device::get().give_back(block->data, block->bytes, block->home);
  }
};

struct LateAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    auto block = std::make_unique<Block>(Block{Device::get().allocate(bytes, current), bytes, current});
    char* const data = block->data;
    return {data, block.release(), &Block::give_back, late_device};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

LateAllocator allocator;

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat>) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), std::nullopt);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

// Queued work refers to memory without owning it, as on a real device.

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  TORCH_CHECK(to.is_contiguous() && from.is_contiguous() && to.scalar_type() == from.scalar_type() &&
              to.numel() == from.numel());
  const std::size_t bytes = to.nbytes();
  void* const target = to.mutable_data_ptr();
  if (from.is_cpu()) {
    const auto* source = static_cast<const char*>(from.const_data_ptr());
    Device::get().enqueue(current, {nullptr, [target, values = std::vector<char>(source, source + bytes)] {
                                      std::memcpy(target, values.data(), values.size());
                                    }});
  } else {
    const void* const source = from.const_data_ptr();
    Device::get().enqueue(current, {nullptr, [target, source, bytes] { std::memcpy(target, source, bytes); }});
    if (to.is_cpu() && !non_blocking) Device::get().run_stream(current);
  }
  return to;
}

at::Tensor& add(at::Tensor& to, const at::Tensor& other, const at::Scalar&) {
  auto* const target = to.mutable_data_ptr<float>();
  const auto* const source = other.const_data_ptr<float>();
  Device::get().enqueue(current, {nullptr, [target, source, count = to.numel()] {
                                    for (std::int64_t i = 0; i < count; ++i) target[i] += source[i];
                                  }});
  return to;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("copy_", &copy);
  library.impl("add_.Tensor", &add);
}

}  // namespace

void restart_late_device(std::uint64_t seed) { Device::get().restart(seed); }
c10::Stream new_late_stream() { return c10::Stream(c10::Stream::UNSAFE, late_device, Device::get().new_stream()); }
void finish_late_device() { Device::get().run_all(); }
void late_host_waits_for_events(bool waits) { Device::get().wait_for_events(waits); }
int take_late_host_waits() { return Device::get().host_waits(); }

}  // namespace dualpipe::test
