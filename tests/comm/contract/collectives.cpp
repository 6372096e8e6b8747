#include "comm/contract.hpp"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

namespace dualpipe::contract {

using ::testing::HasSubstr;
using namespace std::chrono_literals;

constexpr int world_sizes[] = {1, 2, 3, 4, 5};

TEST_P(Contract, AllReduceMatchesTheClosedForm) {
  for (const int size : world_sizes) {
    run(size, [size](Ptr comm) {
      const int r = comm->rank();
      auto parameter = torch::full({2}, 10.0 * r, torch::requires_grad());
      Tensors tensors = {torch::full({3, 2}, r + 1.0),
                         torch::full({4}, r, at::kLong),
                         pattern({6, 5}, r, at::kDouble).t(),
                         torch::tensor(static_cast<float>(r)),
                         torch::empty({0}),
                         at::Tensor(),
                         parameter};
      const Tensors back = comm->all_reduce(tensors).take();
      ASSERT_EQ(back.size(), tensors.size());
      for (std::size_t i = 0; i < back.size(); ++i) EXPECT_TRUE(back[i].is_same(tensors[i])) << "not in place: " << i;
      EXPECT_TRUE(torch::equal(tensors[0], torch::full({3, 2}, size * (size + 1) / 2.0)));
      EXPECT_TRUE(torch::equal(tensors[1], torch::full({4}, size * (size - 1) / 2, at::kLong)));
      auto sum = torch::zeros({5, 6}, at::kDouble);
      for (int other = 0; other < size; ++other) sum += pattern({6, 5}, other, at::kDouble).t();
      EXPECT_TRUE(torch::equal(tensors[2], sum));
      EXPECT_EQ(tensors[3].item<float>(), size * (size - 1) / 2);
      EXPECT_EQ(parameter.detach()[0].item<float>(), 10.0 * (size * (size - 1) / 2));
      EXPECT_TRUE(parameter.is_leaf() && parameter.requires_grad());

      const auto extreme = torch::tensor({double(r), -double(r)});
      EXPECT_TRUE(torch::equal(comm->all_reduce({extreme.clone()}, Reduce::max).take().at(0),
                               torch::tensor({double(size - 1), 0.0})));
      EXPECT_TRUE(torch::equal(comm->all_reduce({extreme.clone()}, Reduce::min).take().at(0),
                               torch::tensor({0.0, -double(size - 1)})));
    });
  }
}

TEST_P(Contract, AllReduceAddsInRankOrderAndIsBitwiseTheSameEverywhere) {
  const int size = 4;
  const auto contribution = [](int rank, at::ScalarType dtype) {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(100 + static_cast<std::uint64_t>(rank));
    return (torch::randn({257}, generator, at::kDouble) * std::pow(10.0, rank)).to(dtype);
  };
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    auto expected = contribution(0, dtype);
    for (int r = 1; r < size; ++r) expected += contribution(r, dtype);
    run(size, [&](Ptr comm) {
      const at::Tensor sum = comm->all_reduce({contribution(comm->rank(), dtype)}).take().at(0);
      for (const at::Tensor& other : comm->all_gather(sum).take()) EXPECT_TRUE(same_bits(sum, other)) << dtype;
      if (GetParam().rank_order) {
        EXPECT_TRUE(same_bits(sum, expected)) << dtype;
      } else {
        EXPECT_TRUE(torch::allclose(sum, expected, 1e-2, 1)) << dtype;
      }
    });
  }
}

TEST_P(Contract, BroadcastGivesTheRootsValuesInPlace) {
  for (const int size : world_sizes) {
    run(size, [size](Ptr comm) {
      for (int root = 0; root < size; ++root) {
        Tensors tensors = {pattern({3, 4}, comm->rank()).t(), torch::full({2}, comm->rank(), at::kLong), at::Tensor()};
        Pending pending = comm->broadcast(tensors, root);
        pending.wait();
        EXPECT_TRUE(torch::equal(tensors[0], pattern({3, 4}, root).t()));
        EXPECT_TRUE(torch::equal(tensors[1], torch::full({2}, root, at::kLong)));
        const Tensors back = pending.take();
        EXPECT_TRUE(back.at(0).is_same(tensors[0]));
        tensors[0].fill_(-1);  // of no concern to others
      }
    });
  }
}

TEST_P(Contract, AllGatherTakesEverySize) {
  for (const int size : world_sizes) {
    run(size, [size](Ptr comm) {
      const auto of = [](int r) { return pattern({r, 3}, r, r % 2 ? at::kFloat : at::kLong); };
      auto own = of(comm->rank());
      if (comm->rank() == 1) own.requires_grad_();
      Pending pending = comm->all_gather(own);
      const Tensors got = pending.take();
      ASSERT_EQ(static_cast<int>(got.size()), size);
      for (int r = 0; r < size; ++r) {
        EXPECT_TRUE(same_bits(got[static_cast<std::size_t>(r)], of(r))) << r;
        EXPECT_EQ(got[static_cast<std::size_t>(r)].requires_grad(), r == 1);
      }
      comm->barrier().wait();
      for (const auto& tensor : got) tensor.detach().fill_(-1);
      comm->barrier().wait();
      EXPECT_TRUE(same_bits(own, of(comm->rank()))) << "shares memory with what was gathered";
    });
  }
}

TEST_P(Contract, AllToAllTakesUnevenSplits) {
  for (const int size : world_sizes) {
    run(size, [size](Ptr comm) {
      const auto between = [](int from, int to) {
        return pattern({(from + 2 * to) % 4, 2}, 7 * from + to, at::kDouble);
      };
      Tensors outgoing;
      for (int r = 0; r < size; ++r) outgoing.push_back(between(comm->rank(), r));
      if (size == 5 && comm->rank() == 4) outgoing[2] = at::Tensor();
      const Tensors got = comm->all_to_all(outgoing).take();
      ASSERT_EQ(static_cast<int>(got.size()), size);
      for (int r = 0; r < size; ++r) {
        const auto& part = got[static_cast<std::size_t>(r)];
        if (size == 5 && r == 4 && comm->rank() == 2) {
          EXPECT_FALSE(part.defined());
        } else {
          EXPECT_TRUE(same_bits(part, between(r, comm->rank()))) << r << " to " << comm->rank();
        }
      }
    });
  }
}

TEST_P(Contract, WhatIsExpectedOfACollectiveIsWhatComes) {
  for (const int size : world_sizes) {
    run(size, [size](Ptr comm) {
      const auto between = [](int from, int to) {
        if (from == 3 && to == 1) return at::Tensor();
        return pattern({(from + 2 * to) % 4, 2}, 7 * from + to, from == 2 ? at::kLong : at::kFloat)
            .set_requires_grad(from == 1);
      };
      for (int round = 0; round < 3; ++round) {
        Tensors outgoing;
        Signature expected;
        for (int r = 0; r < size; ++r) {
          outgoing.push_back(between(comm->rank(), r));
          expected.push_back(signature_of({between(r, comm->rank())}).front());
        }
        const bool knows = comm->rank() % 2 == 0;  // each rank chooses for itself
        const Tensors got = comm->all_to_all(outgoing, knows ? std::optional(expected) : std::nullopt).take();
        EXPECT_EQ(to_string(signature_of(got)), to_string(expected));
        for (int r = 0; r < size; ++r) {
          if (!expected[static_cast<std::size_t>(r)].defined) continue;
          EXPECT_TRUE(same_bits(got[static_cast<std::size_t>(r)], between(r, comm->rank()))) << r;
        }
        Signature gathered;
        for (int r = 0; r < size; ++r) gathered.push_back(signature_of({between(r, r)}).front());
        const Tensors all = comm->all_gather(between(comm->rank(), comm->rank()), gathered).take();
        for (int r = 0; r < size; ++r) EXPECT_TRUE(same_bits(all[static_cast<std::size_t>(r)], between(r, r))) << r;
      }
    });
  }
}

TEST_P(Contract, ACollectiveThatBringsSomethingElseThanExpectedFailsOnAllRanksAndShowsBoth) {
  // Equal numbers of bytes: a device that has begun completes.
  const Tensors parts = {torch::zeros({4}), torch::zeros({2, 2})};
  const std::vector<std::function<Pending(Communicator&, bool knows)>> calls = {
      [&](Communicator& comm, bool knows) {
        return comm.all_to_all(parts, knows ? std::optional(signature_of(parts)) : std::nullopt);
      },
      [&](Communicator& comm, bool knows) {
        return comm.all_gather(parts[1], knows ? std::optional(signature_of(parts)) : std::nullopt);
      },
  };
  for (const auto& call : calls) {
    run(2, [&](Ptr comm) {
      const CommError error = comm_error([&] {
        call(*comm, comm->rank() == 1).wait();
        for (int i = 0; i < 5000; ++i) {
          comm->barrier().wait();
          std::this_thread::sleep_for(1ms);
        }
      });
      EXPECT_THAT(error.what(), HasSubstr("expected [float32 [4]], got [float32 [2, 2]] from rank 0"));
    });
  }
}

TEST_P(Contract, AFenceIsOverWhenTheStreamIs) {
  run(2, [](Ptr comm) {
    Pending fence = comm->fence();
    fence.wait();
    fence.synchronize();
    EXPECT_TRUE(fence.done());
    EXPECT_TRUE(comm->fence().take().empty());
    if (comm->rank() == 0) {
      comm->send(1, {torch::full({1}, 3)}).synchronize();
    } else {
      Pending received = comm->receive(0);
      received.synchronize();
      EXPECT_TRUE(torch::equal(received.take().at(0), torch::full({1}, 3)));
    }
    comm->barrier().synchronize();
    Pending before = comm->fence();
    const CommError error = comm_error([&] {
      comm->barrier().wait();
      if (comm->rank() == 0) comm->abort("no more");
      while (true) {
        before.synchronize();
        std::this_thread::sleep_for(1ms);
      }
    });
    EXPECT_THAT(error.what(), HasSubstr("no more"));
  });
}

TEST_P(Contract, NoRankPassesABarrierBeforeTheLastHasCome) {
  const int size = 4;
  std::atomic<int> entered{0};
  run(size, [&](Ptr comm) {
    for (int round = 1; round <= 20; ++round) {
      if (comm->rank() == round % size) std::this_thread::sleep_for(1ms);
      ++entered;
      comm->barrier().wait();
      EXPECT_GE(entered, round * size);
      comm->barrier().wait();
    }
  });
}

TEST_P(Contract, CollectivesMayBeWaitedForInAnyOrder) {
  run(3, [](Ptr comm) {
    const int r = comm->rank();
    Pending sum = comm->all_reduce({torch::full({2}, r)});
    Pending gathered = comm->all_gather(torch::full({1}, r));
    Pending barrier = comm->barrier();
    Pending copy = comm->broadcast({torch::full({2}, r)}, 2);
    std::vector<std::function<void()>> checks = {
        [&] { EXPECT_TRUE(torch::equal(sum.take().at(0), torch::full({2}, 3))); },
        [&] { EXPECT_TRUE(torch::equal(torch::cat(gathered.take()), torch::arange(3))); },
        [&] { barrier.wait(); },
        [&] { EXPECT_TRUE(torch::equal(copy.take().at(0), torch::full({2}, 2))); },
    };
    std::rotate(checks.begin(), checks.begin() + r, checks.end());
    if (r == 1) std::reverse(checks.begin(), checks.end());
    for (const auto& check : checks) check();
  });
}

TEST_P(Contract, CollectivesAndTransfersDoNotMatchEachOther) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs receives that return before the peer sends";
  if (!GetParam().any_order) GTEST_SKIP() << "both ranks receive before they send";
  run(2, [](Ptr comm) {
    const int peer = 1 - comm->rank();
    Pending received = comm->receive(peer);
    // One rank sends before the collective, the other after it.
    Pending sent;
    if (comm->rank() == 0) sent = comm->send(peer, {torch::full({2}, 10)});
    Pending sum = comm->all_reduce({torch::ones({2})});
    if (comm->rank() == 1) sent = comm->send(peer, {torch::full({2}, 11)});
    EXPECT_TRUE(torch::equal(sum.take().at(0), torch::full({2}, 2.0f)));
    EXPECT_TRUE(torch::equal(received.take().at(0), torch::full({2}, 10 + peer)));
    sent.wait();
  });
}

}  // namespace dualpipe::contract
