#pragma once

#include <cstdint>

// How ranks of different builds refuse each other.
namespace dualpipe::detail::wire {

/// Raised with every change of what travels: ranks with different formats refuse each other.
constexpr std::uint32_t protocol_version = 5;
constexpr std::uint64_t protocol_magic = 0x4455'414c'5049'5045;  // "DUALPIPE"

}  // namespace dualpipe::detail::wire
