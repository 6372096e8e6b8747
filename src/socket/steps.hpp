#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/comm/stopwatch.hpp"
#include "socket/commit.hpp"
#include "socket/peer.hpp"

namespace dualpipe::detail {

/// The ends of steps of a rank that is a process: runs the protocol over the connections. The user's thread votes and
/// waits; the I/O thread says what has arrived, and answers while the user's thread does something else.
class Steps {
 public:
  using Peers = std::vector<std::shared_ptr<Peer>>;

  /// @param peers     by rank, null for this one; outlive this object.
  /// @param patience  for the answers of all ranks after a failure.
  Steps(int rank, const Peers& peers, std::chrono::milliseconds patience)
      : peers_(peers), patience_(patience), protocol_(rank, static_cast<int>(peers.size())) {}

  /// @return the step, for wait()
  std::uint64_t vote(std::int64_t group, const std::vector<int>& members, std::string ballot);
  /// Returns when the step is no longer open, when a rank that has not voted has left, or at `limit` on `watch`.
  /// After a failure it is open no longer.
  StepEnd wait(std::int64_t group, std::uint64_t step, Stopwatch& watch, Stopwatch::Clock::duration limit);

  /// Ranks of the step whose votes have not come.
  std::vector<int> missing(std::int64_t group, std::uint64_t step) const;

  // What happens. After a failure each tells the other ranks what is new.
  bool vote_arrived(int from, Vote vote);  ///< false: as in the protocol
  void goodbye_arrived(int from, const Word& word);
  void failure_arrived(int from, wire::Failure failure) noexcept;
  void lost(int peer, const std::string& reason, bool suspected) noexcept;
  void failed(int origin, const std::string& reason) noexcept;

  /// Unless something has failed. Nothing is said afterwards.
  ///
  /// @param unwound  by an exception.
  void say_goodbye(bool unwound);
  /// Origin and reason of the first failure.
  std::optional<std::pair<int, std::string>> failure() const;

 private:
  template <class Event>
  void settle(int origin, const std::string& reason, const Event& event) noexcept;
  void speak();  // mutex held, which keeps the order of words

  const Peers& peers_;
  const std::chrono::milliseconds patience_;

  mutable std::mutex mutex_;  // guards all that follows
  std::condition_variable changed_;
  CommitProtocol protocol_;
  std::optional<std::pair<int, std::string>> failure_;
  bool said_goodbye_ = false;
};

}  // namespace dualpipe::detail
