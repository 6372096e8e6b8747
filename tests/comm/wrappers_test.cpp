#include <gmock/gmock.h>
#include <torch/torch.h>

#include <atomic>
#include <latch>
#include <optional>
#include <string>
#include <thread>

#include "comm/contract.hpp"
#include "dualpipe/comm/local.hpp"
#include "dualpipe/testing/communicators.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Ptr = std::shared_ptr<Communicator>;
using Wrap = std::function<Ptr(Ptr)>;

contract::BackEnd wrapped(std::string name, bool asynchronous, Wrap wrap) {
  return {std::move(name),
          [wrap = std::move(wrap)](int num_ranks, std::chrono::milliseconds timeout, const contract::Body& body) {
            run_ranks(num_ranks, [&](Ptr comm) { body(wrap(std::move(comm))); }, {.timeout = timeout});
          },
          asynchronous};
}

double seconds(Clock::time_point time) { return std::chrono::duration<double>(time.time_since_epoch()).count(); }

Ptr slow(Ptr inner) { return testing::delayed_links(std::move(inner), {.latency = 300us, .bytes_per_second = 4e9}); }

}  // namespace

namespace contract {
INSTANTIATE_TEST_SUITE_P(Wrappers, Contract,
                         ::testing::Values(wrapped("Serial", false, testing::serial), wrapped("Delayed", true, slow),
                                           wrapped("SerialOverDelayed", false,
                                                   [](Ptr inner) { return testing::serial(slow(std::move(inner))); })),
                         name_of);
}  // namespace contract

namespace {

void run_serial(int num_ranks, const contract::Body& body, LocalOptions options = {}) {
  run_ranks(num_ranks, [&](Ptr comm) { body(testing::serial(std::move(comm))); }, options);
}

TEST(Serial, ASendReturnsOnlyWhenItsReceiverHasCome) {
  std::atomic<bool> receiving{false};
  run_serial(2, [&](Ptr comm) {
    if (comm->rank() == 0) {
      Pending sent = comm->send(1, {torch::ones({2})});
      EXPECT_TRUE(receiving);
      EXPECT_TRUE(sent.done());
    } else {
      std::this_thread::sleep_for(20ms);
      receiving = true;
      Pending received = comm->receive(0);
      EXPECT_TRUE(received.done());
      EXPECT_TRUE(torch::equal(received.take().at(0), torch::ones({2})));
      EXPECT_THROW(received.take(), InvalidArgument);
    }
  });
}

TEST(Serial, TwoRanksThatSendToEachOtherAreToldSo) {
  run_serial(2, [](Ptr comm) {
    try {
      comm->send(1 - comm->rank(), {torch::ones({2})});
      ADD_FAILURE() << "no CommError was thrown";
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("at the same time"), HasSubstr("float32 [2]")));
    }
  });
}

TEST(Serial, TwoRanksThatReceiveFromEachOtherMeetTheDeadline) {
  run_serial(2, [](Ptr comm) { EXPECT_THROW(comm->receive(1 - comm->rank()), CommError); }, {.timeout = 100ms});
}

TEST(Serial, ACycleOfSendsMeetsTheDeadlineAndAnOrderedOneEnds) {
  run_serial(3, [](Ptr comm) { EXPECT_THROW(comm->send((comm->rank() + 1) % 3, {torch::ones({2})}), CommError); },
             {.timeout = 100ms});
  run_serial(3, [](Ptr comm) {
    const int next = (comm->rank() + 1) % 3;
    const int previous = (comm->rank() + 2) % 3;
    at::Tensor got;
    if (comm->rank() == 0) comm->send(next, {torch::full({1}, 0)});
    got = comm->receive(previous).take().at(0);
    if (comm->rank() != 0) comm->send(next, {torch::full({1}, comm->rank())});
    EXPECT_TRUE(torch::equal(got, torch::full({1}, previous)));
  });
}

TEST(Serial, ASecondThreadIsRefused) {
  std::latch waiting(1);
  run_serial(2, [&](Ptr comm) {
    if (comm->rank() == 1) {
      waiting.wait();
      comm->send(0, {torch::ones({1})});
      return;
    }
    std::jthread receiver([&] {
      while (true) {
        try {
          comm->receive(1).wait();
          return;
        } catch (const InvalidArgument&) {  // refused because of the calls below
        }
      }
    });
    std::string refused;
    const auto give_up = Clock::now() + 10s;
    // Until the other thread is in its receive; a call that is refused for its argument where it is not refused for its
    // time.
    while (refused.find("performs another operation") == std::string::npos && Clock::now() < give_up) {
      try {
        comm->broadcast({torch::ones({1})}, 7);
      } catch (const InvalidArgument& error) {
        refused = error.what();
      }
    }
    waiting.count_down();
    EXPECT_THAT(refused, HasSubstr("performs another operation"));
  });
}

// Spans tell the time that a message takes in the modelled network, however busy the machine is.

TEST(DelayedLinks, AMessageTakesLatencyAndTransmissionFromWhenItWasSent) {
  std::atomic<Clock::time_point> sent_at{};
  run_ranks(2, [&](Ptr plain) {
    const auto comm = testing::delayed_links(std::move(plain), {.latency = 30ms, .bytes_per_second = 1e6});
    const std::int64_t elements = 5000;  // 20 kB: 20 ms
    if (comm->rank() == 0) {
      comm->barrier().wait();
      sent_at = Clock::now();
      comm->send(1, {torch::ones({elements})}).wait();
      comm->barrier().wait();
      return;
    }
    Pending received = comm->receive(0, Signature{{.dtype = at::kFloat, .sizes = {elements}}});
    comm->barrier().wait();
    const bool done_early = received.done();
    if (Clock::now() < sent_at.load() + 50ms) {
      EXPECT_FALSE(done_early);
    }
    const Tensors got = received.take();
    EXPECT_GE(seconds(Clock::now()), received.span().end) << "taken before it has arrived";
    EXPECT_TRUE(received.done());
    ASSERT_EQ(got.size(), 1u);
    EXPECT_EQ(got[0].numel(), elements);
    EXPECT_GE(received.span().begin, seconds(sent_at.load()));
    EXPECT_GE(received.span().end, seconds(sent_at.load() + 50ms));
    comm->barrier().wait();
  });
}

TEST(DelayedLinks, ALateReceiverDoesNotWaitAgain) {
  run_ranks(2, [](Ptr plain) {
    const auto comm = testing::delayed_links(plain, {.latency = 100ms});
    if (comm->rank() == 0) {
      Pending sent = comm->send(1, {torch::ones({1})});
      plain->barrier().wait();
      sent.wait();
      plain->barrier().wait();
      return;
    }
    plain->barrier().wait();
    std::this_thread::sleep_for(100ms);
    Pending received = comm->receive(0);
    EXPECT_TRUE(received.done());
    EXPECT_TRUE(torch::equal(received.take().at(0), torch::ones({1})));
    plain->barrier().wait();
  });
}

TEST(DelayedLinks, MessagesOfOneEdgeQueueUpAndThoseOfOthersDoNot) {
  std::atomic<Clock::time_point> begin{};
  run_ranks(3, [&](Ptr plain) {
    const auto comm = testing::delayed_links(plain, {.bytes_per_second = 1e6});
    const auto message = torch::ones({5000});  // 20 ms
    if (comm->rank() == 0) begin = Clock::now();
    plain->barrier().wait();
    if (comm->rank() < 2) {
      std::vector<Pending> sends;
      for (int i = 0; i < (comm->rank() == 0 ? 3 : 1); ++i) sends.push_back(comm->send(2, {message}));
      plain->barrier().wait();
      for (Pending& send : sends) send.wait();
      return;
    }
    std::vector<Pending> receives;
    for (int i = 0; i < 3; ++i) receives.push_back(comm->receive(0));
    receives.push_back(comm->receive(1));
    plain->barrier().wait();
    receives[2].wait();  // the last of the edge, before those ahead of it
    EXPECT_GE(receives[2].span().end, seconds(begin.load() + 60ms));
    EXPECT_TRUE(receives[0].done());
    EXPECT_TRUE(receives[1].done());
    receives[3].wait();
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(torch::equal(receives[static_cast<std::size_t>(i)].take().at(0), message));
  });
  run_ranks(3, [](Ptr plain) {
    const auto comm = testing::delayed_links(plain, {.bytes_per_second = 1});
    if (comm->rank() == 2) {
      const Pending slow = comm->receive(0);
      comm->receive(1).wait();
      EXPECT_FALSE(slow.done());
    } else {
      comm->send(2, {torch::ones({comm->rank() == 0 ? 5000 : 0})}).wait();  // 20000 s, or none
    }
    plain->barrier().wait();
  });
}

TEST(DelayedLinks, CollectivesTakeTheSlowestEdgeIntoARank) {
  run_ranks(3, [](Ptr plain) {
    const auto comm = testing::delayed_links(plain, {.latency = 10ms, .bytes_per_second = 1e6});
    const auto timed = [&](const std::function<Pending()>& call) {
      plain->barrier().wait();
      const auto begin = Clock::now();
      Pending pending = call();
      pending.wait();
      return std::chrono::duration<double>(pending.span().end - seconds(begin));
    };
    EXPECT_GE(timed([&] { return comm->barrier(); }), 10ms);
    EXPECT_GE(timed([&] { return comm->all_reduce({torch::ones({2500})}); }), 20ms);
    EXPECT_GE(timed([&] { return comm->all_gather(torch::ones({comm->rank() == 0 ? 5000 : 10})); }),
              comm->rank() == 0 ? 10ms : 30ms);
    EXPECT_GE(timed([&] { return comm->all_to_all(Tensors(3, torch::ones({2500}))); }), 20ms);
    const auto root = timed([&] { return comm->broadcast({torch::ones({2500})}, 0); });
    if (comm->rank() != 0) {
      EXPECT_GE(root, 20ms);
    }
    EXPECT_EQ(comm->split(0, 0)->size(), 3);
  });
}

/// Counts how often somebody waits for what it has received.
class CountsWaits final : public Communicator {
 public:
  CountsWaits(Ptr inner, std::atomic<int>& waits)
      : Communicator(inner->rank(), inner->size()), inner_(std::move(inner)), waits_(waits) {}
  at::Device device() const override { return inner_->device(); }
  void connect(const std::vector<Edge>& edges) override { inner_->connect(edges); }
  Pending send(int peer, Tensors tensors) override { return inner_->send(peer, std::move(tensors)); }
  Pending receive(int peer, const std::optional<Expected>& expected) override {
    return Pending(std::make_shared<Counted>(inner_->receive(peer, expected), waits_));
  }
  Pending all_reduce(Tensors tensors, Reduce reduce) override { return inner_->all_reduce(std::move(tensors), reduce); }
  Pending broadcast(Tensors tensors, int root) override { return inner_->broadcast(std::move(tensors), root); }
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override {
    return inner_->all_gather(std::move(tensor), expected);
  }
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override {
    return inner_->all_to_all(std::move(tensors), expected);
  }
  Pending barrier() override { return inner_->barrier(); }
  std::vector<std::string> commit(std::string ballot) override { return inner_->commit(std::move(ballot)); }
  Pending fence() override { return inner_->fence(); }
  Ptr split(int color, int key) override { return inner_->split(color, key); }
  void abort(const std::string& reason) noexcept override { inner_->abort(reason); }

 private:
  class Counted final : public Pending::State {
   public:
    Counted(Pending inner, std::atomic<int>& waits) : inner_(std::move(inner)), waits_(waits) {}
    void wait() override {
      ++waits_;
      inner_.wait();
    }
    bool done() const override { return inner_.done(); }
    Tensors take() override { return inner_.take(); }
    Span span() const override { return inner_.span(); }

   private:
    Pending inner_;
    std::atomic<int>& waits_;
  };

  Ptr inner_;
  std::atomic<int>& waits_;
};

TEST(DelayedLinks, WaitingSleepsAndDoesNotPoll) {
  std::atomic<int> waits{0};
  run_ranks(2, [&](Ptr plain) {
    const auto comm =
        testing::delayed_links(std::make_shared<CountsWaits>(std::move(plain), waits), {.latency = 200ms});
    if (comm->rank() == 0) {
      comm->send(1, {torch::ones({1})});
    } else {
      comm->receive(0).wait();
    }
    comm->barrier().wait();
  });
  EXPECT_GE(waits, 1);
  EXPECT_LE(waits, 30);  // at most once in 10 ms
}

TEST(DelayedLinks, AnAbortEndsTheDelay) {
  run_ranks(2, [](Ptr plain) {
    const auto comm = testing::delayed_links(plain, {.latency = 24h});
    if (comm->rank() == 0) {
      comm->send(1, {torch::ones({1})}).wait();
      std::this_thread::sleep_for(20ms);
      comm->abort("enough");
      return;
    }
    Pending received = comm->receive(0);
    EXPECT_THROW(received.wait(), CommError);
    EXPECT_TRUE(received.done());
  });
}

TEST(DelayedLinks, ArgumentsAreChecked) {
  const auto ranks = local_communicators(1);
  EXPECT_THROW(testing::delayed_links(ranks[0], {.latency = -1ns}), InvalidArgument);
  EXPECT_THROW(testing::delayed_links(ranks[0], {.bytes_per_second = -1}), InvalidArgument);
  EXPECT_THROW(testing::delayed_links(nullptr, {}), InvalidArgument);
  EXPECT_THROW(testing::serial(nullptr), InvalidArgument);
}

}  // namespace
}  // namespace dualpipe
