#include "socket/commit.hpp"

#include <algorithm>

namespace dualpipe::detail {

std::uint64_t CommitProtocol::vote(std::int64_t group, const std::vector<int>& members, std::string ballot) {
  Voting& voting = groups_[group];
  if (voting.members.empty()) {
    voting.members = members;
    voting.name = {group, *std::min_element(members.begin(), members.end())};
    state_.over.erase(voting.name);  // nonsense from a peer: no step is over without this rank's vote
  }
  const Vote vote{group, ++voting.step, std::move(ballot)};
  for (const int member : members)
    if (is_here(member)) outbox_.push_back({member, vote});
  voting.arrived[rank_].push_back(vote);
  count_votes(voting);
  return voting.step;
}

bool CommitProtocol::vote_arrived(int from, Vote vote) {
  if (failing_ || state_.lost.contains(from)) return true;
  Voting& voting = groups_[vote.group];
  // A rank is through with a step when it has this rank's vote too, so it is ahead by the step after that at most.
  const std::uint64_t first = voting.members.empty() ? 1 : over(voting.name).step + 1;
  std::deque<Vote>& votes = voting.arrived[from];
  if (vote.step < first) return true;  // overtaken by the goodbye of a rank that is through with it
  if (vote.step != first + votes.size() || votes.size() == 2 || vote.step > voting.step + 1) return false;
  votes.push_back(std::move(vote));
  count_votes(voting);
  return true;
}

void CommitProtocol::count_votes(Voting& voting) {
  if (failing_ || voting.members.empty()) return;
  const std::uint64_t next = over(voting.name).step + 1;
  const auto has_voted = [&](int member) {
    const std::deque<Vote>& votes = voting.arrived[member];
    return !votes.empty() && votes.front().step == next;
  };
  if (!std::all_of(voting.members.begin(), voting.members.end(), has_voted)) return;
  LastStep last{.step = next, .ballots = {}};
  for (const int member : voting.members) {
    last.ballots.push_back(std::move(voting.arrived[member].front().ballot));
    voting.arrived[member].pop_front();
  }
  state_.over[voting.name] = std::move(last);
}

void CommitProtocol::word_arrived(int from, Word word) {
  if (unknown_ || state_.lost.contains(from)) return;
  failing_ = true;
  if (word.decided && !state_.decided) {
    merge(word);
    decide();
  }
  last_words_[from] = std::move(word);
  settle();
}

void CommitProtocol::goodbye_arrived(int from, const Word& word) {
  if (unknown_ || state_.lost.contains(from)) return;
  left_.insert(from);
  merge(word);
  settle();
}

void CommitProtocol::lost(int peer, bool suspected) {
  if (unknown_ || left_.contains(peer) || state_.lost.contains(peer)) return;
  failing_ = true;
  state_.lost.insert(peer);
  if (suspected) state_.suspected.insert(peer);
  settle();
}

void CommitProtocol::failed() {
  failing_ = true;
  settle();
}

void CommitProtocol::give_up() { unknown_ = true; }

/// The steps that are over for the sender are over.
void CommitProtocol::merge(const Word& word) {
  for (const auto& [group, last] : word.over) {
    if (last.step <= over(group).step) continue;
    const auto found = groups_.find(group.number);
    if (found != groups_.end() && found->second.name == group) {
      Voting& voting = found->second;
      // Nonsense from a peer: no step is over without this rank's vote, and each member has voted.
      if (last.step > voting.step || last.ballots.size() != voting.members.size()) continue;
      for (auto& [member, votes] : voting.arrived)
        while (!votes.empty() && votes.front().step <= last.step) votes.pop_front();
    }
    state_.over[group] = last;
  }
}

bool CommitProtocol::in_minority() const {
  std::vector<int> living, reached;
  for (int rank = 0; rank < size_; ++rank) {
    if (left_.contains(rank)) continue;
    const bool lost = state_.lost.contains(rank);
    if (!lost || state_.suspected.contains(rank)) living.push_back(rank);
    if (!lost) reached.push_back(rank);
  }
  if (2 * reached.size() != living.size()) return 2 * reached.size() < living.size();
  return reached.front() != living.front();  // of two halves, that with the lowest rank goes on
}

void CommitProtocol::settle() {
  if (!failing_ || state_.decided || unknown_) return;
  for (std::optional<Word> before; before != state_;) {
    before = state_;
    for (const auto& [from, word] : last_words_) {
      merge(word);
      if (state_.lost.contains(from)) continue;
      if (word.lost.contains(rank_)) {
        unknown_ = true;
        return;
      }
      state_.lost.insert(word.lost.begin(), word.lost.end());
      state_.suspected.insert(word.suspected.begin(), word.suspected.end());
    }
  }
  if (in_minority()) {
    unknown_ = true;
    return;
  }
  if (state_ != said_) {
    said_ = state_;
    for (int rank = 0; rank < size_; ++rank)
      if (rank != rank_ && !left_.contains(rank)) outbox_.push_back({rank, state_});
  }
  for (int rank = 0; rank < size_; ++rank) {
    if (!is_here(rank)) continue;
    const auto word = last_words_.find(rank);
    if (word == last_words_.end() || word->second != state_) return;
  }
  decide();
}

void CommitProtocol::decide() {
  state_.decided = true;
  for (int rank = 0; rank < size_; ++rank)
    if (is_here(rank)) outbox_.push_back({rank, state_});
}

LastStep CommitProtocol::over(GroupName group) const {
  const auto last = state_.over.find(group);
  return last == state_.over.end() ? LastStep() : last->second;
}

StepEnd CommitProtocol::end(std::int64_t group, std::uint64_t step) const {
  const Voting& voting = groups_.at(group);
  LastStep last = over(voting.name);
  if (last.step >= step) return {.outcome = StepOutcome::over, .ballots = std::move(last.ballots), .missing = {}};
  if (unknown_) return {.outcome = StepOutcome::unknown, .ballots = {}, .missing = {}};
  if (state_.decided) return {.outcome = StepOutcome::rolled_back, .ballots = {}, .missing = {}};
  std::vector<int> missing;
  for (const int member : voting.members) {
    const auto arrived = voting.arrived.find(member);
    if (arrived == voting.arrived.end() || arrived->second.empty() || arrived->second.front().step != step)
      missing.push_back(member);
  }
  return open_step(std::move(missing), left_);
}

}  // namespace dualpipe::detail
