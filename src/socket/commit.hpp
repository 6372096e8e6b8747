#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "dualpipe/detail/comm/step_end.hpp"

// Whether a step is over on all ranks of a group or on none, whatever fails meanwhile, and in whatever order messages
// arrive. The protocol of one rank, without threads and connections.
//
// A rank votes when it has come to the end of a step, and is through with the step when it has the votes of its whole
// group. That alone would not do: a rank that is through can fail in its next step, and its failure can reach others
// before the last vote does; or a rank dies when only some have its vote. So from the first failure on nobody gets
// through by votes. Each rank sends a word to all that have not left, and again whenever it has something new to say:
// with which steps it is through, and whom it has lost. What a word says holds for who reads it: its steps are over, and
// its lost are lost. A rank has decided when the last words of all that are left equal its own; it says so, and who
// reads that has decided too.
namespace dualpipe::detail {

/// A group of ranks: its number, which disjoint groups may share, and its lowest rank.
struct GroupName {
  std::int64_t number = 0;
  int lowest = 0;
  auto operator<=>(const GroupName&) const = default;
};

struct Vote {
  std::int64_t group = 0;
  std::uint64_t step = 0;  ///< the group's steps count from 1
  std::string ballot;
};

/// The last step that all ranks of a group are through with.
struct LastStep {
  std::uint64_t step = 0;
  std::vector<std::string> ballots;  ///< by rank in the group
  bool operator==(const LastStep&) const = default;
};

struct Word {
  std::map<GroupName, LastStep> over;
  std::set<int> lost;
  std::set<int> suspected;  ///< those of `lost` that may live, but cannot be reached
  bool decided = false;
  bool operator==(const Word&) const = default;
};

class CommitProtocol {
 public:
  struct Outgoing {
    int to = 0;
    std::variant<Vote, Word> what;
  };

  /// @param rank  this rank, one of `size`.
  CommitProtocol(int rank, int size) : rank_(rank), size_(size) {}

  /// Votes for the next step of a group.
  ///
  /// @param members  by rank in the group, this rank included; always the same for one group.
  /// @return  the step, for end().
  std::uint64_t vote(std::int64_t group, const std::vector<int>& members, std::string ballot);

  // What happens. Each may add to the outbox, and may end steps.
  /// @return false if no rank can have come so far: `from` breaks the protocol.
  bool vote_arrived(int from, Vote vote);
  void word_arrived(int from, Word word);
  /// `from` is through with its last step, and has left with this last word.
  void goodbye_arrived(int from, const Word& word);
  /// @param suspected  false: its process is dead; true: it may live, but nothing of it arrives any more.
  void lost(int peer, bool suspected);
  /// Something has failed, here or elsewhere.
  void failed();
  /// The user's thread waits no longer.
  void give_up();

  /// Of a step for which this rank has voted.
  StepEnd end(std::int64_t group, std::uint64_t step) const;
  bool has_left(int peer) const { return left_.contains(peer); }
  bool has_failed() const noexcept { return failing_; }
  bool knows_nothing() const noexcept { return unknown_; }
  const Word& word() const noexcept { return state_; }

  /// What to send since the last call, in this order.
  std::vector<Outgoing> take_outbox() { return std::exchange(outbox_, {}); }

 private:
  struct Voting {
    std::vector<int> members;  ///< empty before this rank's first vote
    GroupName name;
    std::uint64_t step = 0;  ///< of this rank's last vote
    std::map<int, std::deque<Vote>> arrived;
  };

  LastStep over(GroupName group) const;
  void count_votes(Voting& voting);
  void merge(const Word& word);
  bool in_minority() const;
  void settle();
  void decide();
  bool is_here(int peer) const { return peer != rank_ && !state_.lost.contains(peer) && !left_.contains(peer); }

  const int rank_;
  const int size_;
  std::map<std::int64_t, Voting> groups_;
  bool failing_ = false;
  bool unknown_ = false;
  Word state_;                ///< what this rank would say now
  std::optional<Word> said_;  ///< what it has said last
  std::map<int, Word> last_words_;
  std::set<int> left_;
  std::vector<Outgoing> outbox_;
};

}  // namespace dualpipe::detail
