#include "dualpipe/comm/socket.hpp"

#include <gmock/gmock.h>
#include <pthread.h>
#include <torch/torch.h>

#include <csignal>
#include <filesystem>
#include <latch>
#include <random>
#include <set>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "comm/contract.hpp"
#include "comm/socket_tests.hpp"
#include "launch/process.hpp"
#include "socket/connect.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using detail::Route;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Ptr = std::shared_ptr<Communicator>;
using namespace dualpipe::testing;

/// @param secret  empty: none, and nothing is encrypted.
contract::BackEnd sockets(const std::string& name, Route route, const std::string& secret = "") {
  const auto run = [route, secret](int num_ranks, std::chrono::milliseconds timeout, const contract::Body& body) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    const auto connect = [&](int rank) {
      ConnectOptions options;
      options.timeout = timeout;
      options.store = store;
      options.encryption = !secret.empty();
      World world = world_of(rank, num_ranks);
      world.secret = secret;
      return detail::connect_sockets(world, options, route);
    };
    contract::run_connected(num_ranks, connect, body);
  };
  return {.name = name, .run = run, .exact_clock = route == Route::best};
}

}  // namespace

namespace contract {
INSTANTIATE_TEST_SUITE_P(Sockets, Contract,
                         ::testing::Values(sockets("Unix", Route::best), sockets("Tcp", Route::tcp),
                                           sockets("Tls", Route::tcp, "a secret of the tests")),
                         name_of);
}

namespace {

TEST(Sockets, AWorldOfOneNeedsNoStore) {
  const Ptr comm = connect_sockets(World());
  EXPECT_EQ(comm->size(), 1);
  comm->barrier().wait();
  const auto tensor = torch::ones({3});
  EXPECT_TRUE(torch::equal(comm->all_reduce({tensor}).take().at(0), torch::ones({3})));
}

TEST(Sockets, RefuseAWorldWithoutAMeetingPlace) {
  try {
    connect_sockets(world_of(0, 2));
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("MASTER_PORT"), HasSubstr("dualpipe-run or torchrun")));
  }
  EXPECT_THROW(connect_sockets(world_of(2, 2)), InvalidArgument);
  ConnectOptions impatient;
  impatient.timeout = 0ms;
  EXPECT_THROW(connect_sockets(World(), impatient), InvalidArgument);
}

TEST(Sockets, MeetAtAPort) {
  const int port = free_port();
  const auto errors = errors_of(3, [&](int rank) {
    World world = world_of(rank, 3);
    world.master_port = port;
    if (rank == 0) std::this_thread::sleep_for(100ms);  // the others come before there is a server
    ConnectOptions options;
    options.timeout = 60s;
    const Ptr comm = connect_sockets(world, options);
    const auto sum = comm->all_reduce({torch::full({2}, rank + 1.0)}).take();
    if (!torch::equal(sum.at(0), torch::full({2}, 6.0))) throw Error("wrong sum");
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, SayThatNoThreadCanStartAndLeaveSignalsAsTheyWere) {
  const int port = free_port();
  pthread_attr_t before, huge;
  ASSERT_EQ(::pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(::pthread_getattr_default_np(&huge), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&huge, std::size_t{1} << 47), 0);  // more than there are addresses
  std::latch started(2), ended(2);
  std::atomic<int> changed_masks{0};
  const auto errors = errors_of(2, [&](int rank) {
    started.arrive_and_wait();
    if (rank == 0) ::pthread_setattr_default_np(&huge);
    sigset_t mask_before, mask_after;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_before);
    std::string problem;
    try {
      const Ptr comm = connect_sockets(world_at(port, rank, 2), {.timeout = 60s});
      comm->barrier().wait();
    } catch (const CommError& error) {
      problem = error.what();
    }
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_after);
    for (int signal = 1; signal < 32; ++signal)
      if (sigismember(&mask_before, signal) != sigismember(&mask_after, signal)) ++changed_masks;
    ended.arrive_and_wait();
    if (rank == 0) ::pthread_setattr_default_np(&before);
    throw Error(problem);
  });
  EXPECT_THAT(errors, ::testing::Each(HasSubstr("cannot start the I/O thread: ")));
  EXPECT_EQ(changed_masks, 0);
  EXPECT_THAT(errors_of(2,
                        [&](int rank) {
                          connect_sockets(world_at(port, rank, 2), {.epoch = 1, .timeout = 60s})->barrier().wait();
                        }),
              ::testing::Each(""));
}

TEST(Sockets, MayBeConnectedAgainUnderTheSameName) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(3, [&](int rank) {
    for (int round = 0; round < 5; ++round) {
      const Ptr comm = connect_sockets(world_of(rank, 3), options_with(store));
      comm->barrier().wait();
    }
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, HoldBackAFloodButNotWhatIsWaitedFor) {
  constexpr int num_messages = 6;
  constexpr std::int64_t num_bytes = 32 << 20;
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  std::atomic<bool> looked{false};
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    if (rank == 0) {
      const auto flood = torch::full({num_bytes}, 7, torch::kByte);
      std::vector<Pending> sends;
      for (int i = 0; i < num_messages; ++i) sends.push_back(comm->send(1, {flood}));
      sends.front().wait();
      std::this_thread::sleep_for(300ms);
      const bool held_back = !sends.back().done();
      looked = true;
      comm->barrier().wait();  // travels behind the flood
      for (Pending& send : sends) send.wait();
      if (!held_back) throw Error("nothing was held back");
      return;
    }
    while (!looked) std::this_thread::sleep_for(1ms);
    comm->barrier().wait();
    for (int i = 0; i < num_messages; ++i) {
      if (!comm->receive(0).take().at(0).eq(7).all().item<bool>()) throw Error("wrong bytes");
    }
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, AFloodPassesWhenItIsTaken) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    std::vector<Pending> sends;
    for (int i = 0; rank == 0 && i < 8; ++i) sends.push_back(comm->send(1, {torch::full({24 << 20}, i, torch::kByte)}));
    if (rank == 1) std::this_thread::sleep_for(200ms);
    for (int i = 0; rank == 1 && i < 8; ++i) {
      Pending received = comm->receive(0);
      while (!received.done()) std::this_thread::yield();  // polling alone must get it
      if (!received.take().at(0).eq(i).all().item<bool>()) throw Error("wrong bytes");
    }
    for (Pending& send : sends) send.wait();
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, SayThatAnExceptionUnwindsARank) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  for (const bool in_step : {false, true}) {
    const auto errors = errors_of(3, [&](int rank) {
      const Ptr comm = connect_sockets(world_of(rank, 3), options_with(store));
      comm->barrier().wait();
      if (rank == 1) throw Error("a learning rate of NaN");
      if (in_step) comm->commit("");
      comm->receive(1).wait();
    });
    EXPECT_EQ(errors[1], "a learning rate of NaN");
    for (const int rank : {0, 2})
      EXPECT_THAT(errors[rank],
                  HasSubstr("rank 1 has left, having destroyed its communicator while an exception unwound it"));
  }
}

TEST(Sockets, ManyTensorsTravelInOneMessage) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    Tensors tensors;
    for (int i = 0; i < 3000; ++i)
      tensors.push_back(torch::full({i % 50}, i, torch::kInt));  // more than fit one system call
    Pending sent = comm->send(1 - rank, tensors);
    const Tensors got = comm->receive(1 - rank).take();
    sent.wait();
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (!torch::equal(got.at(i), tensors[i])) throw Error(detail::str("tensor ", i));
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, LeavingDoesNotWaitForAPeerThatTakesNothing) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  std::atomic<bool> left{false};  // never, if leaving waited for the peer
  const auto errors = errors_of(2, [&](int rank) {
    Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    if (rank == 1) {
      while (!left) std::this_thread::sleep_for(5ms);
      return;
    }
    for (int i = 0; i < 5; ++i) comm->send(1, {torch::zeros({32 << 20}, torch::kByte)});
    comm.reset();
    left = true;
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

// ---- ranks that are processes

class SocketProcesses : public ::testing::TestWithParam<int> {
 protected:
  void expect_fine(const std::string& mode) {
    Process ranks(run(GetParam(), mode));
    EXPECT_EQ(ranks.wait(), 0) << ranks.err();
    EXPECT_EQ(count(ranks.out(), "fine"), static_cast<std::size_t>(GetParam())) << ranks.out();
    EXPECT_EQ(ranks.err(), "");
  }
  /// All but rank 1 blame rank 1.
  void expect_blame(const Process& ranks) {
    EXPECT_EQ(count(ranks.out(), "origin 1 "), static_cast<std::size_t>(GetParam() - 1)) << ranks.out() << ranks.err();
    EXPECT_EQ(count(ranks.out(), "origin "), static_cast<std::size_t>(GetParam() - 1)) << ranks.out() << ranks.err();
  }
};

TEST_P(SocketProcesses, Transfer) { expect_fine("transfers"); }
TEST_P(SocketProcesses, TwoCommunicatorsDoNotSeeEachOther) { expect_fine("two_names"); }
TEST_P(SocketProcesses, ConnectAgainAfterAFailure) { expect_fine("reconnect"); }

/// In each meeting.
TEST_P(SocketProcesses, TellTheirLauncherWhomTheyHaveMet) {
  Process ranks({DUALPIPE_RUN, "-q", "-n", std::to_string(GetParam()), "--", "sh", "-c",
                 "export DUALPIPE_MET_FILE=$DUALPIPE_ERROR_FILE.met; " SOCKET_RANK
                 " two_names > /dev/null && echo met $(sort -n $DUALPIPE_MET_FILE)"});
  EXPECT_EQ(ranks.wait(), 0) << ranks.err();
  std::string others;
  for (int rank = 1; rank < GetParam(); ++rank) {
    others += " " + std::to_string(rank) + " " + std::to_string(rank);
    EXPECT_THAT(ranks.out(), HasSubstr("[" + std::to_string(rank) + "] met -1 -1 0 0\n"));
  }
  EXPECT_THAT(ranks.out(), HasSubstr("[0] met -1 -1" + others + "\n"));
}

TEST_P(SocketProcesses, AKilledPeerIsNamedAtOnce) {
  Process ranks(run(GetParam(), "killed"));
  EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("rank 1 closed its connection without saying goodbye (killed?)"));
}

TEST_P(SocketProcesses, AStoppedPeerIsNamedByTheDeadline) {
  Process ranks(run(GetParam(), "stopped", {"--grace", "0.1"}));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("waited for rank 1 longer than the timeout of 5000 ms"));
}

/// Rank 0, where the others meet, gives up first: its end must not overtake the reason.
TEST_P(SocketProcesses, MissingRanksAreNamedByAllThatCame) {
  Process ranks(run(GetParam(), "missing"));
  EXPECT_EQ(ranks.wait(), 0) << ranks.err();
  const auto here = static_cast<std::size_t>(GetParam() / 2);
  EXPECT_EQ(count(ranks.out(), "origin 1 "), here) << ranks.out();
  EXPECT_EQ(count(ranks.out(), here == 1 ? "no sign of rank 1 within" : "no sign of rank 1, 3 within"), here)
      << ranks.out();
}

TEST_P(SocketProcesses, TheOneThatFailedIsBlamedNotThoseWhoReacted) {
  Process ranks(run(GetParam(), "throws"));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  expect_blame(ranks);
  EXPECT_EQ(count(ranks.out(), "failed because of rank 1: the loss is not a number"),
            static_cast<std::size_t>(GetParam() - 1));
}

TEST_P(SocketProcesses, AChildProcessDoesNotHideADeath) {
  Process ranks(run(GetParam(), "child"));
  EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("rank 1 closed its connection without saying goodbye (killed?)"));
}

/// What follows "over " in the output: how many steps are over for each survivor.
std::vector<int> steps_over(const std::string& output) {
  std::vector<int> steps;
  for (auto at = output.find("] over "); at != std::string::npos; at = output.find("] over ", at + 1))
    steps.push_back(std::stoi(output.substr(at + 7)));
  return steps;
}

TEST_P(SocketProcesses, AKilledRankLeavesTheOthersAtOneStep) {
  constexpr unsigned seed = 20;
  std::mt19937 random(seed);
  for (int round = 0; round < 4; ++round) {
    auto command = run(GetParam(), "steps-killed");
    command.push_back(std::to_string(random() % 20'000));
    Process ranks(command);
    EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
    const std::vector<int> over = steps_over(ranks.out());
    EXPECT_EQ(over.size(), static_cast<std::size_t>(GetParam() - 1)) << ranks.out();
    EXPECT_EQ(std::set<int>(over.begin(), over.end()).size(), 1u) << ranks.out();
    EXPECT_EQ(count(ranks.out(), "origin 1 "), over.size()) << ranks.out();
  }
}

TEST_P(SocketProcesses, AStoppedRankIsFoundByItsSilenceNotByTheDeadline) {
  Process ranks(run(GetParam(), "steps-stopped", {"--grace", "0.1"}));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  const std::vector<int> over = steps_over(ranks.out());
  EXPECT_EQ(over.size(), static_cast<std::size_t>(GetParam() - 1)) << ranks.out();
  EXPECT_EQ(std::set<int>(over.begin(), over.end()).size(), 1u) << ranks.out();
  EXPECT_EQ(count(ranks.out(), "rank 1 has given no sign of life for 3000 ms"), over.size()) << ranks.out();
}

INSTANTIATE_TEST_SUITE_P(Ranks, SocketProcesses, ::testing::Values(2, 4), ::testing::PrintToStringParamName());

class SocketsUnderTorchrun : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(TORCHRUN)) GTEST_SKIP() << "there is no " << TORCHRUN;
  }
  static std::vector<std::string> torchrun(const std::string& mode) {
    return {TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", SOCKET_RANK, mode};
  }
};

TEST_F(SocketsUnderTorchrun, Transfer) {
  Process ranks(torchrun("transfers"));
  EXPECT_EQ(ranks.wait(100s), 0) << ranks.err();
  EXPECT_EQ(count(ranks.out(), "fine"), 2u) << ranks.out();
}

TEST_F(SocketsUnderTorchrun, TheErrorIsInTorchrunsReport) {
  Process ranks(torchrun("throws"));
  EXPECT_EQ(ranks.wait(100s), 1) << ranks.err();
  const std::string report = ranks.err().substr(std::min(ranks.err().find("Root Cause"), ranks.err().size()));
  EXPECT_THAT(report, HasSubstr("the loss is not a number")) << ranks.err();
}

}  // namespace
}  // namespace dualpipe
