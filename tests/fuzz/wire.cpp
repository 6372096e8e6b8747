// The frames between ranks: read into what they say, or refused. What was read and is written again reads as the same.
// What they say of the ends of steps is believed as far as it can be true.
#include "socket/wire.hpp"

#include <algorithm>
#include <array>
#include <set>
#include <vector>

#include "dualpipe/error.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {
namespace {

using namespace dualpipe::detail;

/// Tensors are allocated for what really follows only.
constexpr std::uint64_t most_payload = 1 << 16;

std::string_view head_of(const std::string& frame) { return std::string_view(frame).substr(sizeof(wire::Prefix)); }

/// Rank 0 of three, which hears all of it from rank 1. It votes before or after that.
class Listener {
 public:
  explicit Listener(bool votes_first) {
    if (votes_first) vote(0);
  }
  void hear(const Vote& vote) { protocol_.vote_arrived(1, vote); }
  void hear(const Word& word, bool last) {
    last ? protocol_.goodbye_arrived(1, word) : protocol_.word_arrived(1, word);
    for (const auto& [group, step] : word.over)
      if (group.lowest == 0) said_.insert(group.number);
  }
  void vote_for_all() {
    for (const std::int64_t group : said_) vote(group);
  }

 private:
  void vote(std::int64_t group) {
    const std::vector<int> all = {0, 1, 2};
    const StepEnd end = protocol_.end(group, protocol_.vote(group, all, "mine"));
    require(end.ballots.size() == (end.outcome == StepOutcome::over ? all.size() : 0),
            "a step is over with all ballots");
  }

  CommitProtocol protocol_{0, 3};
  std::set<std::int64_t> said_;
};

using Listeners = std::array<Listener, 2>;

void read_head(const wire::Prefix& prefix, std::string_view head, Listeners& listeners) {
  switch (prefix.kind) {
    case wire::Kind::message: {
      const Header header = wire::read_header(head);
      const Header again = wire::read_header(head_of(wire::message_frame(header, prefix.payload_bytes)));
      require(again.signature == header.signature && again.operation == header.operation, "a header comes back");
      if (prefix.payload_bytes > most_payload) return;
      const Tensors tensors = wire::allocate(header, prefix.payload_bytes);
      require(wire::payload_bytes(tensors) == prefix.payload_bytes, "memory is for what was announced");
      return;
    }
    case wire::Kind::vote: {
      const Vote vote = wire::read_vote(head);
      require(head_of(wire::vote_frame(vote)) == head, "a vote comes back");
      for (Listener& listener : listeners) listener.hear(vote);
      return;
    }
    case wire::Kind::failure: {
      const wire::Failure failure = wire::read_failure(head);
      require(wire::read_failure(head_of(wire::failure_frame(failure))).word == failure.word, "a word comes back");
      for (Listener& listener : listeners) listener.hear(failure.word, false);
      return;
    }
    case wire::Kind::goodbye: {
      const wire::Goodbye goodbye = wire::read_goodbye(head);
      require(wire::read_goodbye(head_of(wire::goodbye_frame(goodbye))).word == goodbye.word, "a goodbye comes back");
      for (Listener& listener : listeners) listener.hear(goodbye.word, true);
      return;
    }
    case wire::Kind::answer: {
      const RankActivity activity = wire::read_answer(head);
      require(wire::read_answer(head_of(wire::answer_frame(activity))).waits_for == activity.waits_for,
              "an answer comes back");
      return;
    }
    case wire::Kind::beat:
    case wire::Kind::question:
      return;
  }
}

}  // namespace

/// Frames one after the other, as from a connection.
void read(std::string_view bytes) {
  Listeners listeners = {Listener(true), Listener(false)};
  try {
    while (bytes.size() >= sizeof(wire::Prefix)) {
      const wire::Prefix prefix = wire::read_prefix(bytes.substr(0, sizeof(wire::Prefix)));
      bytes.remove_prefix(sizeof(wire::Prefix));
      if (prefix.head_bytes > bytes.size()) return;
      read_head(prefix, bytes.substr(0, prefix.head_bytes), listeners);
      bytes.remove_prefix(prefix.head_bytes);
      bytes.remove_prefix(std::min<std::uint64_t>(bytes.size(), prefix.payload_bytes));
    }
  } catch (const wire::Malformed& error) {
    require_readable(error.what());
  }
  for (Listener& listener : listeners) listener.vote_for_all();
}

}  // namespace dualpipe::fuzz
