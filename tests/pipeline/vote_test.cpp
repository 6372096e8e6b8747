// What the ranks tell each other at the end of a step.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <set>

#include "dualpipe/comm/local.hpp"
#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/pipeline/finite.hpp"
#include "dualpipe/detail/pipeline/vote.hpp"
#include "error_of.hpp"

namespace dualpipe::test {
namespace {

using detail::device_hash;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::int64_t hash_of(const at::Tensor& tensor) { return device_hash(tensor).item<std::int64_t>(); }

TEST(DeviceHash, IsOfTheValuesAlone) {
  const auto numbers = torch::arange(100, torch::kInt).reshape({10, 10});
  EXPECT_EQ(hash_of(numbers.t()), hash_of(numbers.t().contiguous()));
  // A view whose memory begins between two words.
  const auto bytes = torch::arange(64, torch::kByte);
  for (const std::int64_t begin : {1, 3, 8}) {
    const auto view = bytes.slice(0, begin, begin + 21);
    EXPECT_EQ(hash_of(view), hash_of(view.clone())) << begin;
  }
  EXPECT_NO_THROW(hash_of(torch::empty({0, 3})));
  EXPECT_NO_THROW(hash_of(torch::tensor(true)));
}

TEST(DeviceHash, EveryChangeAndEveryOrderIsAnother) {
  constexpr std::int64_t seed = 5;
  torch::manual_seed(seed);
  const auto tokens = torch::randint(50257, {64, 16}, torch::kLong);
  std::set<std::int64_t> hashes{hash_of(tokens)};
  std::size_t tried = 1;
  const auto expect_another = [&](const at::Tensor& other) {
    EXPECT_EQ((hashes.insert(hash_of(other)), hashes.size()), ++tried);
  };
  for (int i = 0; i < 200; ++i) expect_another(tokens.index_select(0, torch::randperm(64)));
  for (std::int64_t row = 0; row < 64; ++row) {
    auto changed = tokens.clone();
    changed[row][row % 16] += 1;
    expect_another(changed);
  }
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kByte}) {
    const auto images = torch::rand({9, 3}).mul(255).to(dtype);
    EXPECT_NE(hash_of(images), hash_of(images.flip(0))) << dtype;
  }
}

TEST(Vote, BringsLossesAndHashesOfAllRanks) {
  run_ranks(3, [](std::shared_ptr<Communicator> comm) {
    detail::RunOutputs outputs;
    if (comm->rank() != 1)
      for (int m = comm->rank() / 2; m < 4; m += 2) outputs.losses[m] = torch::tensor({0.5 + m}, torch::kDouble);
    detail::MemberHashes mine;
    if (comm->rank() != 0) mine[1] = 7;
    const std::string finding = comm->rank() == 1 ? "the gradient of 'weight'" : "";
    const detail::StepVote all = detail::vote(*comm, outputs, {4}, mine, finding);
    EXPECT_TRUE(torch::equal(all.losses, torch::tensor({0.5, 1.5, 2.5, 3.5}, torch::kDouble)));
    EXPECT_EQ(all.hashes.at(2)[1], 7u);
    EXPECT_EQ(all.hashes.at(0), detail::MemberHashes());
    EXPECT_THAT(all.findings, ::testing::ElementsAre("", "the gradient of 'weight'", ""));
    EXPECT_EQ(detail::non_finite(all, {}, {4}), "the gradient of 'weight'");
    Pending end;
    const auto num_infinite = torch::full({}, comm->rank(), torch::kDouble);
    const detail::StepVote ahead = detail::vote_ahead(*comm, outputs, {4}, mine, num_infinite, end);
    end.synchronize();
    EXPECT_TRUE(torch::equal(ahead.losses.narrow(0, 0, 4), all.losses));
    EXPECT_EQ(ahead.losses[4].item<double>(), 3);
    EXPECT_EQ(ahead.hashes, all.hashes);
    detail::check_hashes(all.hashes, {.pipeline = 3}, 3, detail::world_ranks(*comm));
  });
}

TEST(Vote, ABallotOfAnotherKindIsAnErrorOnAllRanks) {
  for (const std::string& strange : {std::string(), std::string(100, 'x'), std::string(48, '\377')}) {
    run_ranks(3, [&](std::shared_ptr<Communicator> comm) {
      if (comm->rank() == 1) {
        comm->commit(strange);
        return;
      }
      EXPECT_THAT(error_of([&] { detail::vote(*comm, {}, {4}, {}); }), HasSubstr("with a ballot of its own"));
    });
  }
}

TEST(Vote, AnotherNumberOfBallotsThanRanksIsAnError) {
  const std::string ballot = detail::packed_ballot({}, {}, {}, {});
  const auto unpack = [&](std::size_t number) {
    detail::unpacked(std::vector<std::string>(number, ballot), 2, torch::zeros({4}), torch::zeros({4}));
  };
  EXPECT_NO_THROW(unpack(2));
  for (const std::size_t number : {0, 1, 3}) {
    SCOPED_TRACE(number);
    EXPECT_THAT([&] { unpack(number); }, ::testing::ThrowsMessage<Error>(HasSubstr("ballots of 2 ranks")));
  }
}

TEST(Vote, ValuesThatDifferAreNamedWithTheStep) {
  const std::vector<detail::MemberHashes> hashes{{{{}, 4, {}}}, {{{}, {}, {}}}, {{{}, 5, {}}}};
  EXPECT_THAT(error_of([&] { detail::check_hashes(hashes, {.pipeline = 3}, 11, {0, 1, 2}); }),
              AllOf(HasSubstr("batch of step 12, those of the steps before were alike: Batch::targets of rank 2"),
                    HasSubstr("than that of rank 0"), HasSubstr("generator of its own")));
}

}  // namespace
}  // namespace dualpipe::test
