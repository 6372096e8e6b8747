#include "socket/wire.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstring>
#include <random>

namespace dualpipe::detail::wire {
namespace {

Header example() {
  return {.group = 3,
          .channel = Channel::collective,
          .epoch = -2,
          .sequence = 1ULL << 40,
          .issued_ns = 123456789012345,
          .operation = "all_reduce(sum)",
          .signature = {
              {true, true, at::kBFloat16, {2, 0, 5}}, {false, false, at::kFloat, {}}, {true, false, at::kLong, {}}}};
}

Prefix prefix_of(const std::string& frame) { return read_prefix(std::string_view(frame).substr(0, sizeof(Prefix))); }
std::string_view head_of(const std::string& frame) { return std::string_view(frame).substr(sizeof(Prefix)); }

TEST(SocketWire, HeadersComeBackAsTheyWere) {
  const std::string frame = message_frame(example(), 77);
  const Prefix prefix = prefix_of(frame);
  EXPECT_EQ(prefix.kind, Kind::message);
  EXPECT_EQ(prefix.payload_bytes, 77u);
  EXPECT_EQ(prefix.head_bytes, head_of(frame).size());
  const Header got = read_header(head_of(frame));
  const Header expected = example();
  EXPECT_EQ(got.group, expected.group);
  EXPECT_EQ(got.channel, expected.channel);
  EXPECT_EQ(got.epoch, expected.epoch);
  EXPECT_EQ(got.sequence, expected.sequence);
  EXPECT_EQ(got.issued_ns, expected.issued_ns);
  EXPECT_EQ(got.operation, expected.operation);
  EXPECT_EQ(got.signature, expected.signature);
}

TEST(SocketWire, FailuresAndVotesComeBackAndLongReasonsAreCut) {
  const Word word{
      .over = {{{3, 1}, {7, {"a", ""}}}, {{-4, 0}, {1, {}}}}, .lost = {2, 5}, .suspected = {5}, .decided = true};
  const std::string frame = failure_frame({5, "why", word});
  EXPECT_EQ(prefix_of(frame).kind, Kind::failure);
  EXPECT_EQ(read_failure(head_of(frame)).origin, 5);
  EXPECT_EQ(read_failure(head_of(frame)).reason, "why");
  EXPECT_EQ(read_failure(head_of(frame)).word, word);
  for (const bool unwound : {false, true}) {
    const Goodbye goodbye = read_goodbye(head_of(goodbye_frame({word, unwound})));
    EXPECT_EQ(goodbye.word, word);
    EXPECT_EQ(goodbye.unwound, unwound);
  }
  const Vote vote = read_vote(head_of(vote_frame({-2, 9, "ballot"})));
  EXPECT_EQ(std::make_tuple(vote.group, vote.step, vote.ballot), std::make_tuple(-2, 9u, std::string("ballot")));
  EXPECT_LT(failure_frame({5, std::string(10 << 20, 'x'), {}}).size(), 1u << 20);
  EXPECT_EQ(prefix_of(goodbye_frame({})).kind, Kind::goodbye);
  EXPECT_EQ(prefix_of(beat_frame()).kind, Kind::beat);
}

TEST(SocketWire, NothingFollowsAnAnnouncement) {
  Header header = example();
  header.tensors_follow = false;
  const Header got = read_header(head_of(message_frame(header, 0)));
  EXPECT_FALSE(got.tensors_follow);
  EXPECT_EQ(got.signature, header.signature);
  EXPECT_TRUE(allocate(got, 0).empty());
  EXPECT_THROW(allocate(got, 8), Malformed);
}

TEST(SocketWire, AllocatesWhatAHeaderAnnounces) {
  const Tensors tensors = allocate(example(), 8);  // bfloat16 of no elements, and one int64
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors[0].sizes(), (std::vector<std::int64_t>{2, 0, 5}));
  EXPECT_EQ(tensors[0].scalar_type(), at::kBFloat16);
  EXPECT_FALSE(tensors[1].defined());
  EXPECT_EQ(tensors[2].dim(), 0);
  EXPECT_EQ(payload_bytes(tensors), 8u);
}

TEST(SocketWire, RefusesSizesThatDoNotAddUp) {
  EXPECT_THROW(allocate(example(), 9), Malformed);
  Header header = example();
  header.signature = {{true, false, at::kFloat, {-1}}};
  EXPECT_THROW(allocate(header, 0), Malformed);
  header.signature = {{true, false, at::kFloat, {1LL << 40, 1LL << 40}}};
  EXPECT_THROW(allocate(header, 0), Malformed);
  header.signature = {{true, false, static_cast<at::ScalarType>(120), {1}}};
  EXPECT_THROW(allocate(header, 4), Malformed);
}

TEST(SocketWire, RefusesEveryTruncation) {
  const std::string frame = message_frame(example(), 8);
  for (std::size_t size = 0; size < head_of(frame).size(); ++size) {
    EXPECT_THROW(read_header(head_of(frame).substr(0, size)), Malformed) << size;
  }
  EXPECT_THROW(read_header(std::string(head_of(frame)) + "x"), Malformed);
  const std::string failure =
      failure_frame({1, "reason", {.over = {{{3, 1}, {7, {"a", ""}}}}, .lost = {2}, .suspected = {}}});
  for (std::size_t size = 0; size < head_of(failure).size(); ++size) {
    EXPECT_THROW(read_failure(head_of(failure).substr(0, size)), Malformed) << size;
  }
}

TEST(SocketWire, SurvivesDamage) {
  constexpr unsigned seed = 4711;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const std::string frame = message_frame(example(), 8);
  int refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string damaged = frame;
    for (int change = 0; change < 3; ++change) damaged[random() % damaged.size()] = static_cast<char>(random());
    try {
      const Prefix prefix = prefix_of(damaged);
      const Header header = read_header(head_of(damaged));
      // A small limit: what is announced truthfully may be large.
      if (prefix.payload_bytes < 1 << 20) allocate(header, prefix.payload_bytes);
    } catch (const Malformed&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 10'000);
}

}  // namespace
}  // namespace dualpipe::detail::wire
