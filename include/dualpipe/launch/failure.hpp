#pragma once

#include <exception>

#include "dualpipe/launch/world.hpp"

namespace dualpipe {

/// For the exception that ends a rank's main(): prints "rank 3: message" to stderr. Also tells the launcher by
/// `world.error_file`, if it named one: dualpipe-run gathers from these files which rank failed first, torchrun shows
/// them. A CommError that began on another rank bears a time one minute later there, as torchrun calls the earliest the
/// root cause. A file that cannot be written is mentioned on stderr and otherwise ignored. Where World::from_env() itself
/// has thrown, and `world` is still a default one, rank and file are those that the launcher has given this process.
///
///   int main() {
///     const World world = World::from_env();
///     try { train(world); } catch (const std::exception& error) { report_failure(world, error); return 1; }
///   }
void report_failure(const World& world, const std::exception& error) noexcept;

}  // namespace dualpipe
