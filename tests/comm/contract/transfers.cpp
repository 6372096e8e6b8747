#include "comm/contract.hpp"

#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

namespace dualpipe::contract {

using namespace std::chrono_literals;

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

}  // namespace dualpipe::contract
