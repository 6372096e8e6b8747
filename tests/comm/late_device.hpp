#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>

// A device for tests (PrivateUse1 in LibTorch) that does what streams and events permit, at the worst moment. Queued
// work runs only when somebody reads a result, in an order that a seed chooses among the permitted ones. Freed memory
// returns at once to the stream that it was allocated on, and that stream overwrites it. So anything that is read
// before it is written, or after it is freed, has wrong values.
//
// Knows `empty`, copies between contiguous tensors of one dtype, and `add_` of floats. A non-blocking copy to the host
// is queued as everything else.
namespace dualpipe::test {

inline const c10::Device late_device{c10::DeviceType::PrivateUse1, 0};

/// Drops all queued work; `seed` chooses the orders from now on.
void restart_late_device(std::uint64_t seed);
/// A new stream.
c10::Stream new_late_stream();
/// Runs all queued work.
void finish_late_device();
/// false: the host goes on where it should wait for an event.
void late_host_waits_for_events(bool waits);
/// How often the host has waited for the device since the last call.
int take_late_host_waits();

}  // namespace dualpipe::test
