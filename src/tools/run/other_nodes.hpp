#pragma once

#include <chrono>
#include <filesystem>
#include <optional>
#include <string>

#include "contact/stand_in.hpp"
#include "launch/failure_report.hpp"
#include "tools/run/options.hpp"

namespace dualpipe::run {

/// How long nothing is said while ranks of other nodes are looked for.
constexpr std::chrono::seconds kTimeToTellInSilence{1};

/// The other nodes of a job. Their ranks look for rank 0, and that one for all others: where a rank that they look for
/// ends before it has met them, this tells them. Who has met it finds out without.
class OtherNodes {
 public:
  /// @param folder  of the files in which ranks of this node tell whom they have met; empty: none has been started.
  /// @throws InvalidArgument  the secret of the job cannot be read.
  OtherNodes(const Options& options, std::filesystem::path folder);

  /// For a rank of this node.
  std::filesystem::path met_file(int rank) const;

  /// Begins to tell, unless it has begun.
  ///
  /// @param absent  the rank that they look for and that has ended.
  void tell(int absent, const detail::FailureReport& failure);
  /// Whether there is nothing to tell, or it is told, or nobody was found for ten seconds.
  bool is_over() const;
  /// Why it is not over, and what came of it; the latter is empty where there is nothing to say.
  std::string wants() const;
  std::string outcome() const;

 private:
  int node_of(int rank) const { return rank / options_.ranks; }
  bool have_given_up(const detail::FailureReport& failure, const std::set<int>& met) const;
  /// Of a node other than that of rank 0.
  bool others_here_have_met() const;

  const Options options_;
  const std::filesystem::path folder_;
  std::string secret_;
  bool met_before_ = false;
  std::optional<detail::StandIn> stand_in_;
};

/// For a launcher that cannot start its ranks: tells other nodes. Blocks for up to ten seconds, and says so then.
void tell_that_none_starts(const Options& options, const std::string& reason) noexcept;

}  // namespace dualpipe::run
