#pragma once

#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include "contact/secrets.hpp"
#include "dualpipe/launch/world.hpp"
#include "launch/failure_report.hpp"

namespace dualpipe::detail {

/// Greeting::meeting of the launchers of a job, which do not know what communicator its ranks connect.
Bytes32 meeting_of_launchers(const World& world);

/// Stands in for a rank that has ended before it met those of other nodes, and tells them: they would miss it at their
/// timeout only. For launchers. In place of rank 0 it waits where rank 0 would, else it calls rank 0. Callers may encrypt
/// or not.
///
/// Does so on a thread of its own, from the construction on. Where launchers share a host, it finds only communicators
/// with the default name and epoch: the Unix domain socket at which ranks of one host meet is named by them.
class StandIn {
 public:
  /// @param absent   the rank; its node holds World::local_size ranks, as all nodes do.
  /// @param met      other ranks that have met it.
  /// @param failure  what the others are to know.
  /// @param limit    when it gives up.
  StandIn(World absent, std::set<int> met, FailureReport failure, std::chrono::milliseconds limit);
  /// Gives up.
  ~StandIn() = default;

  bool is_over() const { return over_; }
  /// Whether all know it or are told by somebody else: rank 0, who stands in for it, or, where one rank of a node knows
  /// it, the launcher there.
  bool all_know() const { return all_know_; }

 private:
  std::atomic<bool> over_{false}, all_know_{false};
  std::jthread thread_;
};

}  // namespace dualpipe::detail
