#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>

// A device for tests, PrivateUse1 to LibTorch: it does what streams allow it to do, at the worst moment. What its
// streams are given runs when somebody wants to see a result, in an order that a seed chooses among those that events
// permit. Its allocator gives memory back to the stream that it was allocated on, at once, and that stream then
// overwrites it. So whatever is read before it is there, or after it was given back, has other values than it should.
//
// Knows `empty`, copies between contiguous tensors of one dtype, and `add_` of floats.
namespace dualpipe::test {

inline const c10::Device kLateDevice{c10::DeviceType::PrivateUse1, 0};

/// Forgets what streams were given, and chooses orders by `seed` from now on.
void restart_late_device(std::uint64_t seed);
/// A stream that nobody else has.
c10::Stream new_late_stream();
/// Runs everything.
void finish_late_device();

}  // namespace dualpipe::test
