#include "nccl/start_flags.hpp"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <span>
#include <utility>

#include "contact/blocked_signals.hpp"

namespace dualpipe::detail {
namespace {

constexpr auto carry_period = std::chrono::microseconds(10);  // the shortest sleep takes about 60 us more

}  // namespace

StartFlags::~StartFlags() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  if (carrier_.joinable()) carrier_.join();
}

std::vector<StartFlags::End*> StartFlags::add(const std::vector<End>& ends) {
  // Flags are far apart: a device writes one while another is polled.
  constexpr std::size_t apart = 64 / sizeof(DeviceFlag);
  std::shared_ptr<DeviceFlag[]> flags = device_.create_flags(std::max<std::size_t>(1, 2 * apart * ends.size()));
  std::vector<End*> added;
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < ends.size(); ++i) {
    End& end = ends_.emplace_back(ends[i]);
    end.here = &flags[2 * apart * i];
    end.there = &flags[2 * apart * i + apart];
    added.push_back(&end);
  }
  flags_.push_back(std::move(flags));
  if (!carrier_.joinable()) {
    const BlockedSignals blocked;
    carrier_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "dualpipe-flags");
      run();
    });
  }
  return added;
}

// What the two ends of an edge say of its transfers are messages of two groups, since a rank is the sender of one edge
// and the receiver of another with the same peer.
Header StartFlags::header(const End& end, bool from_sender, std::uint32_t number) const {
  return {.group = -(std::int64_t{1} << 50) - 2 * end.group - (from_sender ? 1 : 0),
          .channel = Channel::transfer,
          .epoch = transport_.epoch(),
          .sequence = number,
          .issued_ns = now_ns(),
          .operation = from_sender ? "sender of a transfer has come" : "receiver of a transfer has come",
          .signature = {},
          .tensors_follow = false};
}

void StartFlags::await(End& end, DeviceStream stream) {
  const std::uint32_t number = end.queued + 1;
  std::shared_ptr<Request> posted = transport_.receive(end.peer, header(end, !end.sends, number), false);
  device_.write_flag(stream, *end.here, number);
  device_.wait_for_flag(stream, *end.there, number);
  {
    const std::lock_guard lock(mutex_);
    end.queued = number;
    end.posted.push_back(std::move(posted));
  }
  changed_.notify_all();
}

// Streams compare cyclically, so the flag is behind all that will be queued before the end.
void StartFlags::release() noexcept {
  constexpr std::uint32_t far = std::uint32_t{1} << 30;
  const std::lock_guard lock(mutex_);
  released_ = true;
  for (End& end : ends_) end.there->store(end.queued + far, std::memory_order_release);
}

bool StartFlags::carries() const {
  return std::any_of(ends_.begin(), ends_.end(),
                     [](const End& end) { return end.told != end.queued || !end.posted.empty(); });
}

void StartFlags::run() {
  std::unique_lock lock(mutex_);
  try {
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || carries(); });
      if (stop_) return;
      for (End& end : ends_) carry(end);
      changed_.wait_for(lock, carry_period, [this] { return stop_; });
    }
  } catch (const CommError&) {
    // Some rank has failed: the watchdog releases the streams.
  }
}

void StartFlags::carry(End& end) {
  for (const std::uint32_t here = end.here->load(std::memory_order_acquire); end.told != here; ++end.told)
    transport_.send(end.peer, {header(end, end.sends, end.told + 1), MessageTensors::of({}), {}});
  // done() lets the sockets read on.
  const auto front_came = [&] {
    const std::span<const std::shared_ptr<Request>> front(&end.posted.front(), 1);
    return transport_.done(front) && transport_.succeeded(front);
  };
  for (; !end.posted.empty() && front_came(); end.posted.pop_front()) ++end.heard;
  if (!released_) end.there->store(end.heard, std::memory_order_release);
}

}  // namespace dualpipe::detail
