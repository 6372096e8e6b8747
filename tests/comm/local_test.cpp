#include "dualpipe/comm/local.hpp"

#include <gmock/gmock.h>
#include <torch/torch.h>

#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "comm/contract.hpp"
#include "dualpipe/detail/comm/activity.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;
using Ptr = std::shared_ptr<Communicator>;

contract::BackEnd local() {
  return {"Local", [](int num_ranks, std::chrono::milliseconds timeout, const contract::Body& body) {
            run_ranks(num_ranks, body, {.timeout = timeout});
          }};
}

}  // namespace

namespace contract {
INSTANTIATE_TEST_SUITE_P(Local, Contract, ::testing::Values(local()), name_of);
}

namespace {

/// What rank 1 receives when rank 0 sends `make()` and keeps nothing, and the address that it had at rank 0.
std::pair<at::Tensor, void*> hand_over(const std::function<at::Tensor()>& make) {
  const auto ranks = local_communicators(2);
  at::Tensor tensor = make();
  void* address = tensor.data_ptr();
  Pending sent = ranks[0]->send(1, {std::move(tensor)});
  return {ranks[1]->receive(0).take().at(0), address};
}

TEST(LocalHandOver, ATensorThatNobodyElseHoldsIsNotCopied) {
  const auto [tensor, address] = hand_over([] { return torch::arange(12.0).reshape({3, 4}); });
  EXPECT_EQ(tensor.data_ptr(), address);
  EXPECT_EQ(tensor.storage().use_count(), 1u);
  EXPECT_TRUE(torch::equal(tensor, torch::arange(12.0).reshape({3, 4})));
}

TEST(LocalHandOver, TheOutputOfAGraphThatIsGoneIsNotCopied) {
  const auto [tensor, address] = hand_over([] { return torch::ones({4}, torch::requires_grad()) * 2; });
  EXPECT_EQ(tensor.data_ptr(), address);
  EXPECT_TRUE(tensor.is_leaf() && tensor.requires_grad());
}

TEST(LocalHandOver, ASmallViewDoesNotKeepALargeStorage) {
  const auto [tensor, address] = hand_over([] { return torch::arange(1000.0)[3]; });
  EXPECT_NE(tensor.data_ptr(), address);
  EXPECT_EQ(tensor.storage().nbytes(), tensor.nbytes());
}

TEST(LocalHandOver, MemoryOfSomebodyElseIsCopied) {
  std::vector<float> values = {1, 2, 3};
  const auto [tensor, address] = hand_over([&] { return torch::from_blob(values.data(), {3}); });
  EXPECT_NE(tensor.data_ptr(), address);
  values.assign(3, 0);
  EXPECT_TRUE(torch::equal(tensor, torch::tensor({1.0f, 2.0f, 3.0f})));
}

TEST(LocalHandOver, WhatAGraphSavedIsCopied) {
  const auto ranks = local_communicators(2);
  const auto input = torch::ones({3}, torch::requires_grad());
  auto output = input.exp();  // saves its result
  const auto loss = output.sum();
  ranks[0]->send(1, {std::move(output)});
  const auto got = ranks[1]->receive(0).take().at(0);
  got.detach().zero_();
  loss.backward();
  EXPECT_TRUE(torch::allclose(input.grad(), torch::ones({3}).exp()));
}

TEST(LocalHandOver, ATensorTwiceInAMessageArrivesAsTwo) {
  const auto ranks = local_communicators(2);
  auto tensor = torch::ones({3});
  ranks[0]->send(1, {tensor, tensor});
  tensor.reset();
  const Tensors got = ranks[1]->receive(0).take();
  got[0].zero_();
  EXPECT_TRUE(torch::equal(got[1], torch::ones({3})));
}

TEST(LocalHandOver, ASendIsOverWhenItsReceiverHasCome) {
  const auto ranks = local_communicators(2);
  auto kept = torch::ones({3});
  Pending sent = ranks[0]->send(1, {kept});
  EXPECT_FALSE(sent.done());
  Pending received = ranks[1]->receive(0);
  EXPECT_TRUE(sent.done());
  sent.wait();
  kept.zero_();  // allowed, though the receiver has not taken its tensors yet
  EXPECT_TRUE(torch::equal(received.take().at(0), torch::ones({3})));
}

TEST(LocalHandOver, ASendThatNobodyReceivesMeetsTheDeadline) {
  const auto ranks = local_communicators(2, {.timeout = 50ms});
  Pending sent = ranks[0]->send(1, {torch::ones({3})});
  try {
    sent.wait();
    ADD_FAILURE() << "no CommError was thrown";
  } catch (const CommError& error) {
    EXPECT_EQ(error.origin_rank(), 1);
    EXPECT_EQ(error.operation(), "send to rank 1");
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("message 0 of group 0"), HasSubstr("waited for rank 1"), HasSubstr("50 ms")));
  }
  EXPECT_THROW(ranks[1]->receive(0), CommError) << "the whole family has failed";
}

TEST(LocalHandOver, TheReceiverTooLearnsOfAWriteUnderWay) {
  const auto ranks = local_communicators(2);
  auto kept = torch::ones({3});
  ranks[0]->send(1, {kept});
  kept.add_(1);
  Pending received = ranks[1]->receive(0);
  try {
    received.wait();
    ADD_FAILURE() << "no CommError was thrown";
  } catch (const CommError& error) {
    EXPECT_EQ(error.origin_rank(), 0);
    EXPECT_THAT(error.what(), AllOf(HasSubstr("receive from rank 0"), HasSubstr("in place")));
  }
}

TEST(LocalCommunicators, SayThatAnExceptionUnwindsARank) {
  auto ranks = local_communicators(2);
  try {
    const Ptr unwound = std::exchange(ranks[1], nullptr);
    throw std::runtime_error("a learning rate of NaN");
  } catch (const std::runtime_error&) {
  }
  try {
    ranks[0]->receive(1).wait();
    FAIL();
  } catch (const CommError& error) {
    EXPECT_EQ(error.origin_rank(), 1);
    EXPECT_THAT(error.what(),
                HasSubstr("rank 1 has left, having destroyed its communicator while an exception unwound it"));
  }
}

TEST(LocalCommunicators, ArgumentsAreChecked) {
  EXPECT_THROW(local_communicators(0), InvalidArgument);
  EXPECT_THROW(local_communicators(2, {.timeout = 0ms}), InvalidArgument);
  EXPECT_NO_THROW(local_communicators(2, {.timeout = std::chrono::milliseconds::max()})[0]->send(1, {}));
}

TEST(LocalCommunicators, APendingOutlivesItsCommunicator) {
  auto ranks = local_communicators(2);
  Pending received = ranks[1]->receive(0);
  Pending sent = ranks[0]->send(1, {torch::ones({2})});
  ranks.clear();
  sent.wait();
  EXPECT_TRUE(torch::equal(received.take().at(0), torch::ones({2})));
}

TEST(RunRanks, RunsEachRankOnceOnAThreadOfItsOwn) {
  std::atomic<int> ran{0};
  const auto caller = std::this_thread::get_id();
  run_ranks(4, [&](Ptr comm) {
    EXPECT_NE(std::this_thread::get_id(), caller);
    EXPECT_TRUE(at::GradMode::is_enabled());
    ran += 1 << (8 * comm->rank());
  });
  EXPECT_EQ(ran, 0x01010101);
  EXPECT_THROW(run_ranks(0, [](Ptr) {}), InvalidArgument);
}

TEST(RunRanks, ARanksOwnErrorComesBeforeWhatItCaused) {
  std::atomic<bool> seen{false};
  const auto body = [&](Ptr comm) {
    if (comm->rank() == 1) {
      comm->abort("about to fail");
      while (!seen) std::this_thread::sleep_for(1ms);
      throw std::out_of_range("the cause");
    }
    try {
      comm->receive(1).wait();
    } catch (const CommError&) {
      if (comm->rank() == 0) std::this_thread::sleep_for(20ms);
      seen = true;
      throw;
    }
  };
  EXPECT_THROW(run_ranks(3, body), std::out_of_range);
}

TEST(RunRanks, AnythingThrownEndsAllRanks) {
  const auto body = [](Ptr comm) {
    if (comm->rank() == 0) throw 42;
    comm->receive(0).wait();
  };
  EXPECT_THROW(run_ranks(2, body), int);
}

TEST(SignatureText, NamesWhatTravels) {
  const auto leaf = torch::zeros({4, 8}, torch::requires_grad());
  EXPECT_EQ(to_string(signature_of({leaf, at::Tensor(), torch::tensor(true), torch::zeros({0}, at::kBFloat16)})),
            "[float32 [4, 8] requires_grad, undefined, bool [], bfloat16 [0]]");
  EXPECT_EQ(to_string(Signature{}), "[]");
}

// ---- who is to blame for a wait

TEST(Culprit, IsWhoWaitsForNobody) {
  std::map<int, detail::RankActivity> ranks{
      {1, {{2, 3}, "barrier", 2}}, {2, {{3}, "receive from rank 3", 1}}, {3, {{}, "split", 7.5}}};
  const auto ask = [&](int rank) { return ranks.contains(rank) ? std::optional(ranks.at(rank)) : std::nullopt; };
  const detail::Culprit busy = detail::find_culprit(0, {1}, ask);
  EXPECT_EQ(busy.rank, 3);
  EXPECT_EQ(busy.chain,
            "; rank 1 waits for rank 2, rank 3 in barrier; rank 2 waits for rank 3 in receive from rank 3; rank 3 runs "
            "code of its own for 7.5 s, since split");
  ranks.erase(3);
  EXPECT_THAT(detail::find_culprit(0, {2, 1}, ask).chain, ::testing::EndsWith("; rank 3 does not answer"));
  ranks[3] = {{0}, "receive from rank 0", 1};
  const detail::Culprit circle = detail::find_culprit(0, {2}, ask);
  EXPECT_EQ(circle.rank, 2);
  EXPECT_THAT(circle.chain,
              ::testing::EndsWith("rank 3 waits for rank 0 in receive from rank 0; they wait for each other"));
}

}  // namespace
}  // namespace dualpipe
