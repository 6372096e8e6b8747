#pragma once

#include <exception>

#include "dualpipe/launch/world.hpp"

namespace dualpipe {

/// What a rank's main() does with the exception that ends it: prints "rank 3: message" to stderr, and writes the
/// message to `world.error_file` where the launcher gave one, so that torchrun shows it in its own report. A file that
/// cannot be written is mentioned on stderr and otherwise ignored.
///
///   int main() {
///     const World world = World::from_env();
///     try { train(world); } catch (const std::exception& error) { report_failure(world, error); return 1; }
///   }
void report_failure(const World& world, const std::exception& error) noexcept;

}  // namespace dualpipe
