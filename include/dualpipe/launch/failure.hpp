#pragma once

#include <exception>

#include "dualpipe/launch/world.hpp"

namespace dualpipe {

/// For the exception that ends a rank's main(): prints "rank 3: message" to stderr. Also writes the message to
/// `world.error_file` if the launcher named one; torchrun then shows it in its own report. A file that cannot be
/// written is mentioned on stderr and otherwise ignored.
///
///   int main() {
///     const World world = World::from_env();
///     try { train(world); } catch (const std::exception& error) { report_failure(world, error); return 1; }
///   }
void report_failure(const World& world, const std::exception& error) noexcept;

}  // namespace dualpipe
