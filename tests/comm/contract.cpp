#include "comm/contract.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <latch>
#include <limits>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

namespace dualpipe::contract {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using namespace std::chrono_literals;
using Ptr = std::shared_ptr<Communicator>;

void run_connected(int num_ranks, const std::function<Ptr(int rank)>& connect, const Body& body) {
  std::mutex mutex;
  std::exception_ptr first;
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < num_ranks; ++r) {
      threads.emplace_back([&, r] {
        Ptr communicator;
        try {
          communicator = connect(r);
          body(communicator);
        } catch (const std::exception& error) {
          {
            const std::lock_guard lock(mutex);
            if (!first) first = std::current_exception();
          }
          if (communicator) communicator->abort(error.what());
        }
      });
    }
  }
  if (first) std::rethrow_exception(first);
}

namespace {

template <class Call>
CommError comm_error(Call&& call) {
  try {
    call();
  } catch (const CommError& error) {
    return error;
  }
  ADD_FAILURE() << "no CommError was thrown";
  return CommError(-2, "none", "none");
}

/// Same dtype, sizes and bits; NaNs with the same bits are equal.
bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const auto x = a.detach().contiguous();
  const auto y = b.detach().contiguous();
  return x.numel() == 0 || std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}

/// Different at every position, for every `salt`, and exact in every dtype but bool.
at::Tensor pattern(at::IntArrayRef sizes, int salt, at::ScalarType dtype = at::kFloat) {
  const auto numel = c10::multiply_integers(sizes);
  return torch::arange(numel, at::kLong).add(salt).remainder(97).reshape(sizes).to(dtype);
}

// ----------------------------------------------------------------------------------------------------------------------
// transfers

TEST_P(Contract, KnowsItsPlace) {
  std::atomic<int> seen{0};
  run(3, [&](Ptr comm) {
    EXPECT_EQ(comm->size(), 3);
    EXPECT_TRUE(comm->device().is_cpu());
    seen |= 1 << comm->rank();
  });
  EXPECT_EQ(seen, 0b111);
}

TEST_P(Contract, KthSendMeetsKthReceive) {
  run(2, [](Ptr comm) {
    for (int i = 0; i < 100; ++i) {
      if (comm->rank() == 0) {
        comm->send(1, {torch::full({1 + i % 3}, i)});
      } else {
        const Tensors got = comm->receive(0).take();
        ASSERT_EQ(got.size(), 1u);
        EXPECT_TRUE(torch::equal(got[0], torch::full({1 + i % 3}, i))) << got[0];
      }
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, EveryDtypeArrivesBitExact) {
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  const auto reals = torch::tensor({0.1, -0.0, nan, 1e-320, 3e38}, at::kDouble);
  Tensors sent;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kComplexFloat, at::kComplexDouble}) {
    sent.push_back(reals.to(dtype));
  }
  for (const auto dtype : {at::kLong, at::kInt, at::kShort, at::kChar, at::kByte, at::kBool}) {
    sent.push_back(torch::tensor({0, 1, 100, 127}, at::kLong).to(dtype));
  }
  sent.push_back(torch::tensor({std::numeric_limits<std::int64_t>::min(), (std::int64_t{1} << 53) + 1}, at::kLong));
  run(2, [&](Ptr comm) {
    if (comm->rank() == 0) {
      comm->send(1, sent).wait();
    } else {
      const Tensors got = comm->receive(0, signature_of(sent)).take();
      ASSERT_EQ(got.size(), sent.size());
      for (std::size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(same_bits(got[i], sent[i])) << sent[i].toString();
    }
  });
}

TEST_P(Contract, EveryShapeArrives) {
  const auto base = pattern({4, 6}, 0);
  const Tensors sent = {torch::empty({0, 3}),
                        torch::tensor(7.5),
                        at::Tensor(),
                        base.t(),
                        base.slice(0, 1, 3),
                        base.slice(1, 1, 6, 2),
                        torch::tensor({1.0f}).expand({3, 2}),
                        pattern({2, 3, 4, 5}, 3).contiguous(at::MemoryFormat::ChannelsLast),
                        torch::conj(torch::complex(base, base)),
                        base[2][3]};
  run(2, [&](Ptr comm) {
    if (comm->rank() == 0) {
      comm->send(1, sent).wait();
      comm->send(1, {}).wait();
      return;
    }
    const Tensors got = comm->receive(0, signature_of(sent)).take();
    ASSERT_EQ(got.size(), sent.size());
    for (std::size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i].defined(), sent[i].defined()) << i;
      if (!got[i].defined()) continue;
      EXPECT_TRUE(got[i].is_contiguous()) << i;
      EXPECT_TRUE(got[i].sizes() == sent[i].sizes() && torch::equal(got[i], sent[i])) << i;
    }
    EXPECT_TRUE(comm->receive(0, Signature{}).take().empty());
  });
}

TEST_P(Contract, ReceivedTensorsAreFreshLeaves) {
  run(2, [](Ptr comm) {
    if (comm->rank() == 0) {
      const auto weight = torch::ones({3}, torch::requires_grad());
      auto activation = weight * 2;
      activation.add_(1);
      Pending sent = comm->send(1, {activation, activation.detach(), weight});
      EXPECT_TRUE(sent.take().empty());
      EXPECT_TRUE(activation.grad_fn() != nullptr);
      return;
    }
    Pending pending = comm->receive(0);
    const Tensors got = pending.take();
    ASSERT_EQ(got.size(), 3u);
    for (const std::size_t i : {0, 2}) {
      EXPECT_TRUE(got[i].requires_grad());
      EXPECT_TRUE(got[i].is_leaf());
    }
    EXPECT_FALSE(got[1].requires_grad());
    for (const auto& tensor : got) EXPECT_EQ(tensor._version(), 0);
    (got[0] * got[0]).sum().backward();
    EXPECT_TRUE(torch::equal(got[0].grad(), torch::full({3}, 6.0f)));
    EXPECT_THROW(pending.take(), InvalidArgument);
  });
}

TEST_P(Contract, InferenceModeNeitherSpreadsNorHinders) {
  run(2, [](Ptr comm) {
    const c10::InferenceMode guard(true);
    if (comm->rank() == 0) {
      comm->send(1, {pattern({5}, 1), pattern({5, 2}, 2).t()}).wait();
      return;
    }
    const Tensors got = comm->receive(0).take();
    ASSERT_EQ(got.size(), 2u);
    EXPECT_TRUE(torch::equal(got[0], pattern({5}, 1)));
    EXPECT_TRUE(torch::equal(got[1], pattern({5, 2}, 2).t()));
    EXPECT_FALSE(got[0].is_inference());
    EXPECT_FALSE(got[1].is_inference());
  });
}

TEST_P(Contract, BothEndsOwnWhatTheyHold) {
  for (const bool early_receive : {true, false}) {
    if (early_receive && !GetParam().asynchronous) continue;
    run(2, [&](Ptr comm) {
      const auto whole = pattern({3, 4}, 5);
      if (comm->rank() == 0) {
        auto kept = whole.clone();
        auto view = kept[1];
        auto detached = kept.detach();
        if (early_receive) comm->barrier().wait();
        comm->send(1, {kept, view, detached}).wait();
        kept.zero_();
        comm->barrier().wait();
        comm->barrier().wait();
        EXPECT_TRUE(torch::equal(kept, torch::zeros({3, 4})));
        return;
      }
      Pending pending;
      if (early_receive) {
        pending = comm->receive(0);
        comm->barrier().wait();
      } else {
        pending = comm->receive(0);
      }
      comm->barrier().wait();
      const Tensors got = pending.take();
      ASSERT_EQ(got.size(), 3u);
      EXPECT_TRUE(torch::equal(got[0], whole));
      got[0].fill_(-1);
      EXPECT_TRUE(torch::equal(got[1], whole[1]));
      got[1].fill_(-2);
      EXPECT_TRUE(torch::equal(got[2], whole));
      comm->barrier().wait();
    });
  }
}

TEST_P(Contract, LargeTensorsCrossBothWaysAtOnce) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs sends that return before the peer receives";
  if (!GetParam().any_order) GTEST_SKIP() << "both ranks receive before they send";
  run(2, [](Ptr comm) {
    const int peer = 1 - comm->rank();
    const std::int64_t elements = 4 << 20;  // 16 MiB
    Pending received = comm->receive(peer);
    Pending sent = comm->send(peer, {pattern({elements}, comm->rank())});
    sent.wait();
    const Tensors got = received.take();
    ASSERT_EQ(got.size(), 1u);
    EXPECT_TRUE(torch::equal(got[0], pattern({elements}, peer)));
  });
}

TEST_P(Contract, SendsMayComeLongBeforeReceives) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs sends that return before the peer receives";
  run(2, [](Ptr comm) {
    std::vector<Pending> sends;
    if (comm->rank() == 0) {
      for (int i = 0; i < 5; ++i) sends.push_back(comm->send(1, {torch::full({2}, i)}));
    }
    comm->barrier().wait();
    if (comm->rank() == 1) {
      for (int i = 0; i < 5; ++i) EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), torch::full({2}, i)));
    }
    for (Pending& send : sends) send.wait();
  });
}

TEST_P(Contract, ReceivesMayComeLongBeforeSends) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs receives that return before the peer sends";
  run(2, [](Ptr comm) {
    std::vector<Pending> receives;
    if (comm->rank() == 1) {
      for (int i = 0; i < 5; ++i) receives.push_back(comm->receive(0));
      for (const Pending& receive : receives) EXPECT_FALSE(receive.done());
    }
    comm->barrier().wait();
    if (comm->rank() == 0) {
      for (int i = 0; i < 5; ++i) comm->send(1, {torch::full({2}, i)}).wait();
      return;
    }
    for (int i = 4; i >= 0; --i) {  // in any order
      Pending same = receives[static_cast<std::size_t>(i)];
      same.wait();
      EXPECT_TRUE(same.done());
      EXPECT_TRUE(torch::equal(receives[static_cast<std::size_t>(i)].take().at(0), torch::full({2}, i)));
    }
  });
}

TEST_P(Contract, PollingAloneBringsTransfersToTheirEnd) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs sends that return before the peer receives";
  if (!GetParam().any_order) GTEST_SKIP() << "both ranks receive before they send";
  run(2, [](Ptr comm) {
    const int peer = 1 - comm->rank();
    const auto kept = pattern({1000}, comm->rank());
    const Pending received = comm->receive(peer);
    const Pending sent = comm->send(peer, {kept});
    const auto give_up = std::chrono::steady_clock::now() + ample;
    while (!(received.done() && sent.done()) && std::chrono::steady_clock::now() < give_up)
      std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(received.done());
    EXPECT_TRUE(sent.done());
    EXPECT_TRUE(torch::equal(Pending(received).take().at(0), pattern({1000}, peer)));
    comm->barrier().wait();
  });
}

TEST_P(Contract, DroppedPendingsNeitherBlockNorCancel) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs receives that return before the peer sends";
  run(2, [](Ptr comm) {
    if (comm->rank() == 1) {
      comm->receive(0);
      Pending second = comm->receive(0);
      EXPECT_TRUE(second);
      comm->barrier().wait();
      EXPECT_TRUE(torch::equal(second.take().at(0), torch::full({1}, 2)));
    } else {
      comm->barrier().wait();
      comm->send(1, {torch::full({1}, 1)});
      comm->send(1, {torch::full({1}, 2)});
    }
    comm->barrier().wait();
    EXPECT_FALSE(Pending());
  });
}

TEST_P(Contract, SpanIsFromWhenBothHadComeToTheEnd) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs receives that return before the peer sends";
  std::atomic<double> sent_at{0};
  run(2, [&](Ptr comm) {
    const auto now = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
    if (comm->rank() == 1) {
      Pending early = comm->receive(0);
      comm->barrier().wait();
      early.wait();
      const Span span = early.span();
      if (GetParam().exact_clock) {
        EXPECT_GE(span.begin, sent_at);
      }
      EXPECT_GE(span.end, span.begin);
      EXPECT_LE(span.end, now());
    } else {
      comm->barrier().wait();
      std::this_thread::sleep_for(5ms);
      sent_at = now();
      Pending sent = comm->send(1, {torch::ones({3})});
      sent.wait();
      EXPECT_GE(sent.span().begin, sent_at);
      EXPECT_GE(sent.span().end, sent.span().begin);
      EXPECT_LE(sent.span().end, now());
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, AWrongCallIsRefusedAndHarmless) {
  run(2, [](Ptr comm) {
    const int me = comm->rank();
    const Tensors one = {torch::ones({2})};
    EXPECT_THROW(comm->send(me, one), InvalidArgument);
    EXPECT_THROW(comm->send(2, one), InvalidArgument);
    EXPECT_THROW(comm->send(-1, one), InvalidArgument);
    EXPECT_THROW(comm->receive(me), InvalidArgument);
    EXPECT_THROW(comm->receive(2), InvalidArgument);
    EXPECT_THROW(comm->receive(-1), InvalidArgument);
    EXPECT_THROW(comm->broadcast(one, 2), InvalidArgument);
    EXPECT_THROW(comm->broadcast(one, -1), InvalidArgument);
    EXPECT_THROW(comm->all_to_all(one), InvalidArgument);
    EXPECT_THROW(comm->all_to_all({one[0], one[0]}, Signature(1)), InvalidArgument);
    EXPECT_THROW(comm->all_gather(one[0], Signature(2, {.dtype = at::kLong, .sizes = {2}})), InvalidArgument);
    EXPECT_THROW(comm->all_reduce({torch::ones({2}, at::kComplexFloat)}, Reduce::max), InvalidArgument);
    EXPECT_THROW(comm->send(1 - me, {torch::ones({2}).to_sparse()}), InvalidArgument);
    EXPECT_THROW(comm->send(1 - me, {torch::empty({2}, at::kMeta)}), InvalidArgument);
    EXPECT_THROW(comm->connect({{0, 0}}), InvalidArgument);
    EXPECT_THROW(comm->connect({{0, 2}}), InvalidArgument);
    if (me == 0) {
      comm->send(1, one).wait();
    } else {
      EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), one[0]));
    }
  });
}

TEST_P(Contract, ConnectAgreesOnTheEdges) {
  run(3, [](Ptr comm) {
    comm->connect({{0, 1}, {1, 2}, {2, 0}});
    const int next = (comm->rank() + 1) % 3;
    const int previous = (comm->rank() + 2) % 3;
    if (comm->rank() == 0) comm->send(next, {torch::full({1}, 0)});
    EXPECT_TRUE(torch::equal(comm->receive(previous).take().at(0), torch::full({1}, previous)));
    if (comm->rank() != 0) comm->send(next, {torch::full({1}, comm->rank())});
    comm->barrier().wait();
  });
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      comm->connect(comm->rank() == 0 ? std::vector<Communicator::Edge>{{0, 1}}
                                      : std::vector<Communicator::Edge>{{1, 0}});
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("0->1"), HasSubstr("1->0")));
  });
}

// --------------------------------------------------------------------------------------------------------------------
// collectives

constexpr int kSizes[] = {1, 2, 3, 4, 5};

TEST_P(Contract, AllReduceMatchesTheClosedForm) {
  for (const int size : kSizes) {
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
  for (const int size : kSizes) {
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
  for (const int size : kSizes) {
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
  for (const int size : kSizes) {
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
  for (const int size : kSizes) {
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
  // As many bytes, so that a device that had begun comes to its end.
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

TEST_P(Contract, WhatHostsSayToEachOtherIsApart) {
  run(3, [](Ptr comm) {
    Communicator& hosts = comm->control();
    EXPECT_TRUE(hosts.device().is_cpu());
    EXPECT_EQ(hosts.rank(), comm->rank());
    EXPECT_EQ(hosts.size(), comm->size());
    const int r = comm->rank();
    Pending sum = comm->all_reduce({torch::full({2}, r)});
    Pending said = hosts.all_gather(torch::full({1}, 10 + r));
    EXPECT_TRUE(torch::equal(torch::cat(said.take()), torch::tensor({10, 11, 12})));
    EXPECT_TRUE(torch::equal(sum.take().at(0), torch::full({2}, 3)));
    if (r == 0) {
      comm->send(1, {torch::full({1}, 1)});
      hosts.send(1, {torch::full({1}, 2)});
    } else if (r == 1) {
      Pending first = comm->receive(0);
      EXPECT_TRUE(torch::equal(hosts.receive(0).take().at(0), torch::full({1}, 2)));
      EXPECT_TRUE(torch::equal(first.take().at(0), torch::full({1}, 1)));
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, SplitMakesGroupsOrderedByKeyThenRank) {
  run(5, [](Ptr comm) {
    const int r = comm->rank();
    // Colors 0 (ranks 0, 2, 4) and 7 (1, 3), keys descending and negative.
    const auto group = comm->split(r % 2 == 0 ? 0 : 7, -r);
    ASSERT_NE(group, nullptr);
    EXPECT_EQ(group->size(), r % 2 == 0 ? 3 : 2);
    EXPECT_EQ(group->rank(), (r % 2 == 0 ? 4 - r : 3 - r) / 2);
    const auto ranks = torch::cat(group->all_gather(torch::full({1}, r)).take());
    EXPECT_TRUE(torch::equal(ranks, r % 2 == 0 ? torch::tensor({4, 2, 0}) : torch::tensor({3, 1})));

    // Equal keys: by rank. A negative color takes part and belongs to nothing.
    const auto tail = comm->split(r < 2 ? -3 : 1, 0);
    EXPECT_EQ(tail == nullptr, r < 2);
    if (tail) {
      EXPECT_EQ(tail->rank(), r - 2);
    }

    // Transfers of the groups, of the parent and between the same two ranks in two groups stay apart.
    const auto again = comm->split(0, 0);
    if (r == 2 || r == 4) {
      const int there_in_group = r == 2 ? 0 : 1;
      if (r == 2) {
        group->send(there_in_group, {torch::full({1}, 100)});
        comm->send(4, {torch::full({1}, 200)});
        again->send(4, {torch::full({1}, 300)});
        tail->send(2, {torch::full({1}, 400)});
      } else if (GetParam().asynchronous) {
        EXPECT_TRUE(torch::equal(tail->receive(0).take().at(0), torch::full({1}, 400)));
        EXPECT_TRUE(torch::equal(again->receive(2).take().at(0), torch::full({1}, 300)));
        EXPECT_TRUE(torch::equal(comm->receive(2).take().at(0), torch::full({1}, 200)));
        EXPECT_TRUE(torch::equal(group->receive(there_in_group).take().at(0), torch::full({1}, 100)));
      } else {
        EXPECT_TRUE(torch::equal(group->receive(there_in_group).take().at(0), torch::full({1}, 100)));
        EXPECT_TRUE(torch::equal(comm->receive(2).take().at(0), torch::full({1}, 200)));
        EXPECT_TRUE(torch::equal(again->receive(2).take().at(0), torch::full({1}, 300)));
        EXPECT_TRUE(torch::equal(tail->receive(0).take().at(0), torch::full({1}, 400)));
      }
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, GroupsSplitAgain) {
  run(4, [](Ptr comm) {
    const int r = comm->rank();
    const auto half = comm->split(r / 2, 0);
    const auto alone = half->split(half->rank(), 0);
    EXPECT_EQ(alone->size(), 1);
    EXPECT_TRUE(torch::equal(alone->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, r)));
    const auto swapped = half->split(0, -half->rank());
    EXPECT_EQ(swapped->rank(), 1 - half->rank());
    const auto diagonal = comm->split(r == 0 || r == 3 ? 1 : 2, 0);
    EXPECT_TRUE(torch::equal(swapped->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, r < 2 ? 1 : 5)));
    EXPECT_TRUE(torch::equal(diagonal->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, 3)));
    comm->barrier().wait();
  });
}

// ------------------------------------------------------------------------------------------------------------------------
// failure

TEST_P(Contract, DifferentSignaturesFailOnBothEndsAndShowBoth) {
  const auto mismatch = [](Ptr comm) {
    const CommError error = comm_error([&] {
      if (comm->rank() == 0) {
        comm->send(1, {torch::zeros({4, 16})}).wait();
      } else {
        comm->receive(0, Signature{{.requires_grad = true, .dtype = at::kBFloat16, .sizes = {4, 8}}}).wait();
      }
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("bfloat16 [4, 8] requires_grad"), HasSubstr("float32 [4, 16]")));
    EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0"), HasSubstr("rank 1"), HasSubstr("message 0 of group 0")));
    EXPECT_FALSE(error.operation().empty());
    EXPECT_GE(error.origin_rank(), 0);
  };
  // The rank that finds it leaves at once: its departure must not overtake the reason.
  for (int round = 0; round < 25 && !HasFailure(); ++round) run(2, mismatch);
}

TEST_P(Contract, AdviceIsPartOfTheErrorOnBothEnds) {
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      if (comm->rank() == 0) {
        comm->send(1, {torch::zeros({2})}).wait();
      } else {
        comm->receive(0, Expected(signature_of({torch::zeros({3})}), "ask stage 7")).wait();
      }
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("expected [float32 [3]"), HasSubstr("got [float32 [2]"),
                                    HasSubstr(" from rank 0; ask stage 7")));
  });
}

TEST_P(Contract, RequiresGradIsPartOfTheSignature) {
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      if (comm->rank() == 0) {
        comm->send(1, {torch::zeros({2})}).wait();
      } else {
        comm->receive(0, Signature{{.requires_grad = true, .dtype = at::kFloat, .sizes = {2}}}).wait();
      }
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("expected [float32 [2] requires_grad"), HasSubstr("got [float32 [2]"),
                                    Not(HasSubstr("got [float32 [2] requires_grad"))));
  });
}

TEST_P(Contract, DifferentCollectivesFailOnAllRanksAndShowBoth) {
  run(3, [](Ptr comm) {
    const CommError error = comm_error([&] {
      if (comm->rank() == 2) {
        comm->barrier().wait();
      } else {
        comm->all_reduce({torch::zeros({5})}).wait();
      }
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("barrier"), HasSubstr("all_reduce(sum)"), HasSubstr("rank 2")));
  });
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      comm->all_reduce({torch::zeros({5 + comm->rank()})}).wait();
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("float32 [5]"), HasSubstr("float32 [6]")));
  });
  run(3, [](Ptr comm) {
    const CommError error = comm_error([&] {
      comm->broadcast({torch::zeros({5})}, comm->rank() == 0 ? 1 : 0).wait();
      comm->barrier().wait();
    });
    EXPECT_THAT(error.what(), HasSubstr("broadcast from rank"));
  });
}

TEST_P(Contract, AWriteBeforeWaitIsNoticed) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs sends that return before the peer receives";
  run(2, [](Ptr comm) {
    if (comm->rank() == 0) {
      auto tensor = torch::ones({3});
      Pending sent = comm->send(1, {torch::zeros({2}), tensor});
      tensor.add_(1);
      const CommError error = comm_error([&] { sent.wait(); });
      EXPECT_THAT(error.what(), AllOf(HasSubstr("send to rank 1"), HasSubstr("tensor 1"), HasSubstr("in place")));
    } else {
      const CommError error = comm_error([&] {
        comm->receive(0).wait();
        comm->barrier().wait();
      });
      EXPECT_THAT(error.what(), AllOf(HasSubstr("tensor 1"), HasSubstr("in place"), HasSubstr("rank 0")));
    }
  });
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      auto tensor = torch::ones({3});
      Pending pending = comm->all_reduce({tensor});
      tensor.add_(1);
      pending.wait();
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("all_reduce(sum)"), HasSubstr("in place")));
  });
}

TEST_P(Contract, ADeadlineNamesPeerAndOperation) {
  struct Case {
    std::string operation;
    std::function<void(Communicator&)> call;
  };
  const std::vector<Case> cases = {
      {"receive from rank 1", [](Communicator& comm) { comm.receive(1).wait(); }},
      {"all_reduce(sum)", [](Communicator& comm) { comm.all_reduce({torch::ones({1})}).wait(); }},
      {"broadcast from rank 1", [](Communicator& comm) { comm.broadcast({torch::ones({1})}, 1).wait(); }},
      {"all_gather", [](Communicator& comm) { comm.all_gather(torch::ones({1})).wait(); }},
      {"all_to_all", [](Communicator& comm) { comm.all_to_all({torch::ones({1}), torch::ones({1})}).wait(); }},
      {"barrier", [](Communicator& comm) { comm.barrier().wait(); }},
      {"split", [](Communicator& comm) { comm.split(0, 0); }},
  };
  for (const Case& test : cases) {
    std::latch over(1);
    run(
        2,
        [&](Ptr comm) {
          if (comm->rank() == 1) {
            over.wait();  // busy with something else
            // Between processes the news takes its time, and a barrier may have met the other's before.
            const CommError seen = comm_error([&] {
              for (int i = 0; i < 5000; ++i) {
                comm->barrier().wait();
                std::this_thread::sleep_for(1ms);
              }
            });
            EXPECT_THAT(seen.what(), HasSubstr(test.operation));
            return;
          }
          const auto begin = std::chrono::steady_clock::now();
          const CommError error = comm_error([&] { test.call(*comm); });
          const auto waited = std::chrono::steady_clock::now() - begin;
          over.count_down();
          EXPECT_GE(waited, 100ms);
          EXPECT_LT(waited, 5s);
          EXPECT_EQ(error.origin_rank(), 1);
          EXPECT_EQ(error.operation(), test.operation);
          EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0: " + test.operation), HasSubstr("waited for rank 1"),
                                          HasSubstr("100 ms")));
        },
        100ms);
  }
}

TEST_P(Contract, AnAbortEndsEveryKindOfWait) {
  struct Case {
    const char* name;
    std::function<void(Communicator&)> call;
  };
  const std::vector<Case> cases = {
      {"receive", [](Communicator& comm) { comm.receive(0).wait(); }},
      {"send",
       [](Communicator& comm) {
         comm.send(0, {torch::ones({1 << 20})}).wait();
         comm.barrier().wait();  // where the send was buffered
       }},
      {"all_reduce", [](Communicator& comm) { comm.all_reduce({torch::ones({1})}).wait(); }},
      {"broadcast", [](Communicator& comm) { comm.broadcast({torch::ones({1})}, 0).wait(); }},
      {"all_gather", [](Communicator& comm) { comm.all_gather(torch::ones({1})).wait(); }},
      {"all_to_all", [](Communicator& comm) { comm.all_to_all(Tensors(3, torch::ones({1}))).wait(); }},
      {"barrier", [](Communicator& comm) { comm.barrier().wait(); }},
      {"split", [](Communicator& comm) { comm.split(0, 0); }},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    run(3, [&](Ptr comm) {
      if (comm->rank() == 0) {
        std::this_thread::sleep_for(20ms);
        comm->abort("the loss is not a number");
        comm->abort("a second reason that nobody hears");
      }
      const auto check = [](const CommError& error) {
        EXPECT_EQ(error.origin_rank(), 0);
        EXPECT_THAT(error.what(), HasSubstr("the loss is not a number"));
      };
      const auto begin = std::chrono::steady_clock::now();
      if (comm->rank() != 0) check(comm_error([&] { test.call(*comm); }));
      EXPECT_LT(std::chrono::steady_clock::now() - begin, 10s);
      // And everything after it.
      const int peer = comm->rank() == 0 ? 1 : 0;
      check(comm_error([&] { comm->send(peer, {torch::ones({1})}).wait(); }));
      check(comm_error([&] { comm->receive(peer).wait(); }));
      check(comm_error([&] { comm->barrier().wait(); }));
      check(comm_error([&] { comm->split(0, 0); }));
    });
  }
}

TEST_P(Contract, AnAbortComesFromAnyThreadAndReachesTheWholeFamily) {
  std::latch ready(3);
  run(3, [&](Ptr comm) {
    const auto pair = comm->split(comm->rank() == 2 ? 1 : 0, 0);
    Pending before = comm->barrier();
    before.wait();
    ready.arrive_and_wait();
    if (comm->rank() == 0) std::jthread([pair] { pair->abort("from another thread"); });
    // Rank 2 is in another group than the one that aborts.
    for (const Ptr& member : {comm, pair}) {
      const CommError error = comm_error([&] {
        while (true) {
          member->barrier().wait();
          std::this_thread::sleep_for(1ms);
        }
      });
      EXPECT_EQ(error.origin_rank(), 0);
      EXPECT_THAT(error.what(), HasSubstr("from another thread"));
    }
    EXPECT_THROW(before.wait(), CommError) << "what was over before the abort";
    EXPECT_TRUE(before.done());
  });
}

TEST_P(Contract, AnExceptionOnOneRankEndsAll) {
  std::atomic<int> ended{0};
  const auto body = [&](Ptr comm) {
    if (comm->rank() == 1) throw std::domain_error("user code failed");
    const CommError error = comm_error([&] { comm->receive(1).wait(); });
    EXPECT_THAT(error.what(), HasSubstr("user code failed"));
    EXPECT_EQ(error.origin_rank(), 1);
    ++ended;
    throw CommError(error);
  };
  EXPECT_THROW(run(4, body), std::domain_error);
  EXPECT_EQ(ended, 3);
}

TEST_P(Contract, ARankThatLeavesFailsOnlyWhatStillNeedsIt) {
  if (!GetParam().asynchronous) GTEST_SKIP() << "needs sends that return before the peer receives";
  const bool buffered = GetParam().buffered;
  std::latch left(1);
  std::latch received(1);
  run(3, [&](Ptr comm) {
    if (comm->rank() == 2) {
      Pending sent = comm->send(0, {torch::full({2}, 5)});
      if (!buffered) sent.wait();
      sent = {};
      comm.reset();
      left.count_down();
      return;
    }
    if (buffered) left.wait();
    if (comm->rank() == 0) {
      EXPECT_TRUE(torch::equal(comm->receive(2).take().at(0), torch::full({2}, 5))) << "sent before it left";
      left.wait();
      comm->send(1, {torch::full({2}, 6)}).wait();
      received.wait();
      const CommError error = comm_error([&] { comm->receive(2).wait(); });
      EXPECT_EQ(error.origin_rank(), 2);
      EXPECT_THAT(error.what(), AllOf(HasSubstr("receive from rank 2"), HasSubstr("rank 2 has left")));
    } else {
      EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), torch::full({2}, 6)));
      received.count_down();
      EXPECT_THAT(comm_error([&] { comm->receive(0).wait(); }).what(), HasSubstr("rank 2 has left"));
    }
  });
}

TEST_P(Contract, FamiliesDoNotSeeEachOther) {
  std::latch connected(2);
  std::latch aborted(2);
  std::jthread other([&] {
    run(2, [&](Ptr comm) {
      comm->barrier().wait();
      connected.arrive_and_wait();
      if (comm->rank() == 0) comm->abort("only here");
      EXPECT_THAT(comm_error([&] { comm->receive(1 - comm->rank()).wait(); }).what(), HasSubstr("only here"));
      aborted.count_down();
    });
  });
  run(2, [&](Ptr comm) {
    for (int i = 0; i < 10; ++i) {
      if (i == 5) aborted.wait();
      if (comm->rank() == 0) {
        comm->send(1, {torch::full({1}, i)});
      } else {
        EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), torch::full({1}, i)));
      }
      EXPECT_TRUE(torch::equal(comm->all_reduce({torch::ones({1})}).take().at(0), torch::full({1}, 2.0f)));
    }
  });
}

// -------------------------------------------------------------------------------------------------------------------------
// stress

TEST_P(Contract, RandomProgramsDeliverTheRightValues) {
  constexpr at::ScalarType dtypes[] = {at::kFloat, at::kDouble, at::kLong, at::kBFloat16};
  for (const unsigned seed : {1u, 2u, 3u}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const int size = 2 + static_cast<int>(seed);
    run(size, [&](Ptr comm) {
      std::mt19937 program(seed);                                           // the same on all ranks
      std::mt19937 own(1000 * seed + static_cast<unsigned>(comm->rank()));  // when this rank waits
      const auto pick = [](std::mt19937& random, int below) {
        return static_cast<int>(random() % static_cast<unsigned>(below));
      };
      const int me = comm->rank();
      struct Open {
        Pending pending;
        std::function<void(const Tensors&)> check;
      };
      std::vector<Open> open;
      const auto close = [&](std::size_t i) {
        open[i].check(open[i].pending.take());
        open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
      };
      for (int step = 0; step < 150; ++step) {
        const int kind = pick(program, 8);
        const auto dtype = dtypes[pick(program, 4)];
        const std::vector<std::int64_t> sizes = {pick(program, 40), 1 + pick(program, 50)};
        const int a = pick(program, size);
        const int b = (a + 1 + pick(program, size - 1)) % size;
        const auto value = [=](int rank) { return pattern(sizes, 31 * step + 7 * rank, dtype); };
        if (kind < 4) {  // a transfer
          if (me == a) {
            open.push_back({comm->send(b, {value(a), value(b)}), [](const Tensors& got) { EXPECT_TRUE(got.empty()); }});
          } else if (me == b) {
            std::optional<Expected> expected;
            if (kind == 0) expected = signature_of({value(a), value(b)});
            open.push_back({comm->receive(a, expected), [=](const Tensors& got) {
                              ASSERT_EQ(got.size(), 2u);
                              EXPECT_TRUE(same_bits(got[0], value(a)) && same_bits(got[1], value(b)))
                                  << "step " << step;
                            }});
          }
        } else if (kind == 4) {
          open.push_back({comm->all_reduce({value(me)}, Reduce::max), [=](const Tensors& got) {
                            auto expected = value(0);
                            for (int r = 1; r < size; ++r) expected = torch::maximum(expected, value(r));
                            EXPECT_TRUE(same_bits(got.at(0), expected)) << "step " << step;
                          }});
        } else if (kind == 5) {
          open.push_back({comm->broadcast({value(me)}, a),
                          [=](const Tensors& got) { EXPECT_TRUE(same_bits(got.at(0), value(a))) << "step " << step; }});
        } else if (kind == 6) {
          std::optional<Signature> expected;
          if (pick(own, 2) == 0) expected = Signature(static_cast<std::size_t>(size), signature_of({value(0)}).front());
          open.push_back({comm->all_gather(value(me), expected), [=](const Tensors& got) {
                            for (int r = 0; r < size; ++r) {
                              EXPECT_TRUE(same_bits(got.at(static_cast<std::size_t>(r)), value(r))) << "step " << step;
                            }
                          }});
        } else {
          Tensors outgoing;
          for (int r = 0; r < size; ++r) outgoing.push_back(value(me).add(r));
          open.push_back({comm->all_to_all(std::move(outgoing)), [=](const Tensors& got) {
                            for (int r = 0; r < size; ++r) {
                              EXPECT_TRUE(same_bits(got.at(static_cast<std::size_t>(r)), value(r).add(me)))
                                  << "step " << step;
                            }
                          }});
        }
        // A transfer may be waited for as soon as its other end has been issued, which the order of the program
        // guarantees.
        while (!open.empty() && (open.size() > 12 || pick(own, 3) == 0))
          close(static_cast<std::size_t>(pick(own, static_cast<int>(open.size()))));
      }
      while (!open.empty()) close(open.size() - 1);
    });
  }
}

}  // namespace
}  // namespace dualpipe::contract
