#include "socket/steps.hpp"

namespace dualpipe::detail {

std::uint64_t Steps::vote(std::int64_t group, const std::vector<int>& members, std::string ballot) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t step = protocol_.vote(group, members, std::move(ballot));
  speak();
  return step;
}

StepEnd Steps::wait(std::int64_t group, std::uint64_t step, Stopwatch& watch, Stopwatch::Clock::duration limit) {
  std::unique_lock lock(mutex_);
  StepEnd end;
  const auto ended = [&] {
    end = protocol_.end(group, step);
    return end.outcome != StepOutcome::open;
  };
  watch.wait(changed_, lock, limit, [&] { return ended() || end.has_left || failure_; });
  // After a failure every rank answers, is dead, or is found silent.
  if (failure_ && !Stopwatch().wait(changed_, lock, patience_, ended)) {
    protocol_.give_up();
    speak();
    ended();
  }
  return end;
}

std::vector<int> Steps::missing(std::int64_t group, std::uint64_t step) const {
  const std::lock_guard lock(mutex_);
  return step == 0 ? std::vector<int>() : protocol_.end(group, step).missing;
}

bool Steps::vote_arrived(int from, Vote vote) {
  const std::lock_guard lock(mutex_);
  const bool possible = protocol_.vote_arrived(from, std::move(vote));
  changed_.notify_all();
  return possible;
}

void Steps::goodbye_arrived(int from, const Word& word) {
  const std::lock_guard lock(mutex_);
  protocol_.goodbye_arrived(from, word);
  speak();
}

void Steps::failure_arrived(int from, wire::Failure failure) noexcept {
  settle(failure.origin, failure.reason, [&] { protocol_.word_arrived(from, std::move(failure.word)); });
}

void Steps::lost(int peer, const std::string& reason, bool suspected) noexcept {
  settle(peer, reason, [&] { protocol_.lost(peer, suspected); });
}

void Steps::failed(int origin, const std::string& reason) noexcept {
  settle(origin, reason, [&] { protocol_.failed(); });
}

template <class Event>
void Steps::settle(int origin, const std::string& reason, const Event& event) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (said_goodbye_) return;
    if (!failure_) failure_ = {origin, reason};
    event();
    speak();
  } catch (...) {
    for (const auto& peer : peers_)
      if (peer) peer->shut();  // no memory: the others see that this rank is lost
  }
}

void Steps::speak() {
  for (const auto& [to, what] : protocol_.take_outbox()) {
    Peer& peer = *peers_[to];
    if (const auto* vote = std::get_if<Vote>(&what)) {
      peer.send(*vote);
    } else {
      peer.tell({failure_->first, failure_->second, std::get<Word>(what)});
    }
  }
  if (protocol_.knows_nothing()) {
    for (const auto& peer : peers_)
      if (peer) peer->shut();
  }
  changed_.notify_all();
}

void Steps::say_goodbye(bool unwound) {
  const std::lock_guard lock(mutex_);
  if (failure_) return;
  said_goodbye_ = true;
  for (const auto& peer : peers_)
    if (peer) peer->say_goodbye({protocol_.word(), unwound});
}

std::optional<std::pair<int, std::string>> Steps::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

}  // namespace dualpipe::detail
