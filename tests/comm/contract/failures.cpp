#include "comm/contract.hpp"

#include <atomic>
#include <functional>
#include <latch>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace dualpipe::contract {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using namespace std::chrono_literals;

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
      {"commit", [](Communicator& comm) { comm.commit(""); }},
      {"split", [](Communicator& comm) { comm.split(0, 0); }},
  };
  for (const Case& test : cases) {
    std::latch over(1);
    run(
        2,
        [&](Ptr comm) {
          if (comm->rank() == 1) {
            over.wait();  // busy with something else
            // Between processes the abort takes a while, and a first barrier may match the other rank's.
            const CommError seen = comm_error([&] {
              for (int i = 0; i < 5000; ++i) {
                comm->barrier().wait();
                std::this_thread::sleep_for(1ms);
              }
            });
            EXPECT_THAT(seen.what(), HasSubstr(test.operation));
            return;
          }
          const CommError error = comm_error([&] { test.call(*comm); });
          over.count_down();
          EXPECT_EQ(error.origin_rank(), 1);
          EXPECT_EQ(error.operation(), test.operation);
          EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0: " + test.operation), HasSubstr("waited for rank 1"),
                                          HasSubstr("300 ms")));
        },
        300ms);
  }
}

/// Rank 0 waits for 1, that for 2, that for 3, and that for nobody: it is named, whoever's deadline comes first.
TEST_P(Contract, ADeadlineNamesTheRankForWhichAllWait) {
  if (!GetParam().follows_waits) GTEST_SKIP() << "its deadlines name the rank for which an operation waits";
  const std::vector<std::function<void(Communicator&)>> calls = {
      [](Communicator& comm) { comm.receive(comm.rank() + 1).wait(); },
      [](Communicator& comm) { comm.commit(""); },
  };
  for (const auto& call : calls) {
    std::latch over(3);
    run(
        4,
        [&](Ptr comm) {
          if (comm->rank() == 3) return over.wait();
          std::this_thread::sleep_for(50ms * comm->rank());
          const CommError error = comm_error([&] { call(*comm); });
          over.count_down();
          EXPECT_EQ(error.origin_rank(), 3);
          EXPECT_THAT(error.what(), HasSubstr("rank 3 runs code of its own"));
        },
        600ms);
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
      {"commit", [](Communicator& comm) { comm.commit(""); }},
      {"split", [](Communicator& comm) { comm.split(0, 0); }},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.name);
    // With a timeout that no test reaches: only the abort can end the waits.
    run(
        3,
        [&](Ptr comm) {
          if (comm->rank() == 0) {
            std::this_thread::sleep_for(20ms);
            comm->abort("the loss is not a number");
            comm->abort("a second reason that nobody hears");
          }
          const auto check = [](const CommError& error) {
            EXPECT_EQ(error.origin_rank(), 0);
            EXPECT_THAT(error.what(), HasSubstr("the loss is not a number"));
          };
          if (comm->rank() != 0) check(comm_error([&] { test.call(*comm); }));
          // And everything after it.
          const int peer = comm->rank() == 0 ? 1 : 0;
          check(comm_error([&] { comm->send(peer, {torch::ones({1})}).wait(); }));
          check(comm_error([&] { comm->receive(peer).wait(); }));
          check(comm_error([&] { comm->barrier().wait(); }));
          check(comm_error([&] { comm->split(0, 0); }));
        },
        24h);
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
      EXPECT_THAT(error.what(), AllOf(HasSubstr("receive from rank 2"), HasSubstr("rank 2 has left"),
                                      ::testing::Not(HasSubstr("exception"))));
    } else {
      EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), torch::full({2}, 6)));
      received.count_down();
      EXPECT_THAT(comm_error([&] { comm->receive(0).wait(); }).what(), HasSubstr("rank 2 has left"));
    }
  });
}

}  // namespace dualpipe::contract
