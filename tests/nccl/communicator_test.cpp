// One communicator: devices, tensors, warm-up, and failures of devices and NCCL.
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <torch/torch.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <latch>
#include <mutex>

#include "dualpipe/comm/device_trace.hpp"
#include "dualpipe/comm/nccl.hpp"
#include "emulated_rank.hpp"
#include "forwarding.hpp"
#include "nccl/cuda.hpp"
#include "nccl/rank_device.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using namespace std::chrono_literals;

TEST(NcclDevices, EachRankUsesItsLocalRankUnlessTold) {
  EXPECT_EQ(detail::device_problem({.rank = 5, .local_rank = 1, .local_size = 2, .count = 2}, ""), "");
  EXPECT_EQ(detail::device_problem({.rank = 5, .local_rank = 3, .local_size = 4, .wanted = 0, .count = 1}, ""), "");
}

TEST(NcclDevices, NoDeviceSaysWhyAndWhatToUseInstead) {
  EXPECT_THAT(
      detail::device_problem({.rank = 2}, "no CUDA-capable device is detected"),
      AllOf(HasSubstr("rank 2: no CUDA device (no CUDA-capable device is detected)"), HasSubstr("connect_sockets")));
}

TEST(NcclDevices, MoreRanksThanDevicesSaysHowMany) {
  EXPECT_THAT(detail::device_problem({.rank = 2, .local_rank = 2, .local_size = 4, .count = 2}, ""),
              AllOf(HasSubstr("rank 2: 4 ranks on this host, but 2 CUDA devices"), HasSubstr("at most 2")));
  EXPECT_THAT(detail::device_problem({.rank = 0, .wanted = 3, .count = 1}, ""),
              AllOf(HasSubstr("NcclOptions::device is 3"), HasSubstr("1 CUDA device,")));
}

TEST(NcclDevices, TwoRanksOnOneDeviceSaysWhatToSet) {
  EXPECT_EQ(detail::sharing_problem({"a", "b", "c"}), "");
  EXPECT_THAT(detail::sharing_problem({"a", "b", "a"}),
              AllOf(HasSubstr("ranks 0 and 2"), HasSubstr("NCCL 2.30"), HasSubstr("NCCL_MULTI_RANK_GPU_ENABLE=1"),
                    HasSubstr("LOCAL_RANK")));
}

TEST(NcclDevices, WhatKeepsRanksFromSharingOneSaysWhatToDo) {
  EXPECT_EQ(detail::sharing_obstacle({"a", "b"}, 22809, nullptr), "") << "none is shared";
  EXPECT_EQ(detail::sharing_obstacle({"a", "a"}, 23007, "1"), "");
  EXPECT_THAT(detail::sharing_obstacle({"a", "a"}, 22809, "1"), AllOf(HasSubstr("2.30"), HasSubstr("this is 2.28.9")));
  EXPECT_THAT(detail::sharing_obstacle({"a", "a"}, 23007, nullptr),
              AllOf(HasSubstr("NCCL_MULTI_RANK_GPU_ENABLE=1"), HasSubstr("not set")));
  EXPECT_THAT(detail::sharing_obstacle({"a", "a"}, 23007, "0"), HasSubstr("it is \"0\""));
}

TEST(BothReady, NeedsHardwareQueuesAndNoOrderOfLaunches) {
  EXPECT_EQ(detail::both_ready_obstacle(nullptr, "32"), "");
  EXPECT_EQ(detail::both_ready_obstacle("0", "32"), "");
  EXPECT_THAT(detail::both_ready_obstacle("1", "32"), HasSubstr("NCCL_LAUNCH_ORDER_IMPLICIT=1 exclude each other"));
  EXPECT_THAT(detail::both_ready_obstacle(nullptr, nullptr),
              AllOf(HasSubstr("CUDA_DEVICE_MAX_CONNECTIONS=32"), HasSubstr("not set")));
  EXPECT_THAT(detail::both_ready_obstacle(nullptr, "8"), HasSubstr("it is \"8\""));
}

TEST(NcclVersion, AnOlderLibraryIsRefusedByName) {
  EXPECT_EQ(detail::nccl_version_problem(23007, 23007, "x"), "");
  EXPECT_EQ(detail::nccl_version_problem(23007, 23100, "x"), "");
  EXPECT_THAT(detail::nccl_version_problem(23007, 22809, "/usr/lib/libnccl.so.2"),
              HasSubstr("LibTorch's NCCL 2.30.7 expected, 2.28.9 loaded first from /usr/lib/libnccl.so.2"));
}

TEST(NcclMissing, AProgramWithoutNcclSaysSo) {
  try {
    connect_nccl(World{});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("built without NCCL"), HasSubstr("dualpipe::nccl")));
  }
}

TEST(NcclTensors, WhatTheDeviceCannotTakeIsRefusedAndHarmless) {
  const testing::NcclEmulation emulation(2);
  run_emulated(emulation, 2, {.timeout = 20s}, [](const EmulatedRank& rank) {
    Communicator& comm = *rank.communicator;
    const int peer = 1 - comm.rank();
    try {
      comm.send(peer, {torch::ones({2}), torch::empty({2}, at::kMeta)});
      ADD_FAILURE() << "nothing was thrown";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(),
                  AllOf(HasSubstr("tensor 1 of send is on meta"), HasSubstr("tensors of cpu"), HasSubstr(".to(")));
    }
    EXPECT_THROW(comm.all_reduce({torch::ones({2}).to_sparse()}), InvalidArgument);
    // The sender drops a non-contiguous view at once.
    const auto table = torch::arange(12).reshape({3, 4});
    if (comm.rank() == 0) {
      comm.send(1, {table.clone().t()});
    } else {
      EXPECT_TRUE(torch::equal(comm.receive(0).take().at(0), table.t()));
    }
    comm.barrier().wait();
  });
  expect_clean(emulation);
}

TEST(NcclTensors, SumsOfWhatNcclDoesNotAddUp) {
  const testing::NcclEmulation emulation(3);
  run_emulated(emulation, 3, {.timeout = 20s}, [](const EmulatedRank& rank) {
    const int r = rank.communicator->rank();
    const auto real = torch::arange(6.0).reshape({2, 3}) + r;
    Tensors tensors = {torch::full({3}, 1000 * r, at::kShort), torch::tensor({r == 1, r == 2, false}),
                       torch::complex(real, -real), torch::complex(real, -real).t()};
    rank.communicator->all_reduce(tensors).wait();
    EXPECT_TRUE(torch::equal(tensors[0], torch::full({3}, 3000, at::kShort)));
    EXPECT_TRUE(torch::equal(tensors[1], torch::tensor({true, true, false})));
    const auto sum = 3 * torch::arange(6.0).reshape({2, 3}) + 3;
    EXPECT_TRUE(torch::equal(tensors[2], torch::complex(sum, -sum)));
    EXPECT_TRUE(torch::equal(tensors[3], torch::complex(sum, -sum).t()));
  });
  expect_clean(emulation);
}

TEST(NcclSignatures, WhatWasAgreedOnOnceIsLaunchedAtOnceAndStillCompared) {
  const testing::NcclEmulation emulation(2);
  std::atomic<int> failed{0};
  const auto body = [&](const EmulatedRank& rank) {
    Communicator& comm = *rank.communicator;
    const Signature expected = signature_of({torch::zeros({4})});
    for (int k = 0; k < 3; ++k) {
      if (comm.rank() == 0) {
        comm.send(1, {torch::full({4}, 1.0f * k)}).wait();
      } else {
        EXPECT_TRUE(torch::equal(comm.receive(0, expected).take().at(0), torch::full({4}, 1.0f * k)));
      }
    }
    try {
      if (comm.rank() == 0) {
        comm.send(1, {torch::zeros({8})}).wait();
      } else {
        comm.receive(0, expected).wait();
      }
      comm.barrier().wait();
      ADD_FAILURE() << "nothing was thrown";
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("expected [float32 [4]]"), HasSubstr("got [float32 [8]]")));
      ++failed;
    }
  };
  run_emulated(emulation, 2, {.timeout = 20s}, body);
  EXPECT_EQ(failed, 2);
}

TEST(NcclOptionsTest, AnUnknownControlPlaneIsRefused) {
  const testing::NcclEmulation emulation(1);
  EXPECT_THROW(detail::NcclCommunicator::world(nullptr, emulation.device(0), emulation.nccl(0), {}), InvalidArgument);
}

// ---------------------------------------------------------------------------------------------------------------------
// what a communicator opens and warms up

using ::testing::ElementsAre;

TEST(WarmUp, ConnectsWhatIsUsedLater) {
  const testing::NcclEmulation emulation(4);
  run_emulated(emulation, 4, {.timeout = 20s}, [](const EmulatedRank& rank) {
    Communicator& world = *rank.communicator;
    const auto group = world.split(world.rank() / 2, world.rank());
    world.connect(all_edges(4));
    const std::vector<std::string> connected = rank.emulation.connections(world.rank());
    EXPECT_THAT(connected, ::testing::Contains(HasSubstr("large all_reduce")));
    for (const std::int64_t count : {1, 1 << 16}) {
      for (Communicator* each : {&world, group.get()}) {
        each->all_reduce({torch::ones({count})}).wait();
        each->broadcast({torch::ones({count})}, 1).wait();
      }
      group->all_to_all({torch::ones({count}), torch::ones({count})}).wait();
      group->all_gather(torch::ones({count})).wait();
      for (int from = 0; from < 4; ++from)
        for (int to = 0; to < 4; ++to) {
          if (from == to) continue;
          if (world.rank() == from) world.send(to, {torch::ones({count})}).wait();
          if (world.rank() == to) world.receive(from).wait();
        }
    }
    EXPECT_EQ(rank.emulation.connections(world.rank()), connected);
    world.barrier().wait();
  });
  expect_clean(emulation);
}

TEST(WarmUp, OnlyWhoHasEdgesOpensACommunicatorForTransfers) {
  const testing::NcclEmulation emulation(2);
  run_emulated(emulation, 2, {.timeout = 20s}, [](const EmulatedRank& rank) {
    Communicator& world = *rank.communicator;
    const auto group = world.split(0, world.rank());
    const auto opened = [&] { return rank.emulation.communicators(world.rank()); };
    EXPECT_THAT(opened(), ElementsAre(HasSubstr("collectives"), HasSubstr("collectives")));
    world.connect({{0, 1}});
    EXPECT_THAT(opened(), ElementsAre(HasSubstr("collectives"), HasSubstr("collectives"), HasSubstr("transfers 0")));
    // A transfer that was not announced runs in the order of the collectives.
    Pending sum = group->all_reduce({torch::ones({3})});
    if (world.rank() == 0) {
      group->send(1, {torch::ones({2})});
    } else {
      EXPECT_TRUE(torch::equal(group->receive(0).take().at(0), torch::ones({2})));
    }
    EXPECT_TRUE(torch::equal(sum.take().at(0), torch::full({3}, 2.0F)));
    world.barrier().wait();
    EXPECT_EQ(opened().size(), 3U);
  });
  expect_clean(emulation);
}

TEST(WarmUp, GroupsThatExchangeNothingConnectNoPeers) {
  const testing::NcclEmulation emulation(2);
  run_emulated(emulation, 2, {.timeout = 20s}, [](const EmulatedRank& rank) {
    Communicator& world = *rank.communicator;
    const auto peers = [&] {
      std::vector<std::string> connected = rank.emulation.connections(world.rank());
      std::erase_if(connected, [](const std::string& each) { return each.find("send to") == std::string::npos; });
      return connected;
    };
    const auto sums = world.split_for({.exchanges = false, .sums = true}, 0, world.rank());
    EXPECT_THAT(peers(), IsEmpty());
    EXPECT_THAT(rank.emulation.connections(world.rank()),
                ::testing::Contains(AllOf(HasSubstr("sums"), HasSubstr("large all_reduce"))));
    const auto experts = world.split(0, world.rank());
    EXPECT_THAT(peers(), ElementsAre(HasSubstr(detail::str("send to ", 1 - world.rank()))));
    // It is a hint: all works.
    EXPECT_EQ(sums->all_to_all({torch::ones({3}), torch::ones({3})}).take().size(), 2U);
    EXPECT_EQ(peers().size(), 2U);
    world.barrier().wait();
  });
  expect_clean(emulation);
}

/// Notes the thread blocks that each communicator may use.
class NotesLimits final : public ForwardingNccl {
 public:
  NotesLimits(std::shared_ptr<detail::NcclApi> inner, std::vector<std::string>& notes)
      : ForwardingNccl(std::move(inner)), notes_(notes) {}
  detail::NcclComm init(int ranks, const detail::NcclId& id, int rank, const detail::NcclConfig& config) override {
    notes_.push_back(detail::str(config.name, ": ", config.ctas.min, " to ", config.ctas.max));
    return inner_->init(ranks, id, rank, config);
  }

 private:
  std::vector<std::string>& notes_;
};

TEST(ThreadBlocks, EachUseHasLimitsOfItsOwn) {
  for (const bool per_edge : {false, true}) {
    const testing::NcclEmulation emulation(2);
    std::array<std::vector<std::string>, 2> limits;
    const detail::NcclCommunicatorOptions options{.timeout = 20s,
                                                  .communicator_per_edge = per_edge,
                                                  .name = "job",
                                                  .transfer_ctas = {.max = 4},
                                                  .collective_ctas = {.min = 2, .max = 5},
                                                  .sum_ctas = {.min = 2}};
    run_emulated(
        emulation, 2, options,
        [](const EmulatedRank& rank) {
          Communicator& world = *rank.communicator;
          const auto sums = world.split_for({.sums = true}, 0, world.rank());
          const auto experts = world.split(0, world.rank());
          world.connect({{0, 1}});
          world.barrier().wait();
        },
        [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
          nccl = std::make_shared<NotesLimits>(nccl, limits[rank]);
        });
    for (const auto& of_rank : limits)
      EXPECT_THAT(of_rank, ElementsAre("job collectives 0: 2 to 5", "job sums 1: 2 to 0", "job collectives 2: 2 to 5",
                                       per_edge ? "job edge 0->1 of 0: 0 to 4" : "job transfers 0: 0 to 4"));
  }
}

TEST(WarmUp, CommunicatorsOfEdgesOpenSideBySide) {
  const testing::NcclEmulation emulation(4);
  const auto meeting = std::make_shared<Meeting>(4);
  run_emulated(
      emulation, 4, {.timeout = 60s, .communicator_per_edge = true},
      [](const EmulatedRank& rank) {
        rank.communicator->connect({{0, 1}, {1, 0}, {1, 2}, {2, 1}, {2, 3}, {3, 2}});
        rank.communicator->barrier().wait();
      },
      [&](int, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        nccl = std::make_shared<MeetingNccl>(nccl, meeting);
      });
  EXPECT_FALSE(meeting->failed());
  expect_clean(emulation);
}

TEST(PollBriefly, NeverSleeps) {
  const auto sleeps = [] {
    rusage usage{};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
  };
  const auto before = sleeps();
  int polls = 0;
  EXPECT_TRUE(detail::poll_briefly(1h, [&] { return ++polls == 1000; }));
  EXPECT_LT(sleeps() - before, 500);
  EXPECT_FALSE(detail::poll_briefly(0us, [] { return false; }));
}

// ---------------------------------------------------------------------------------------------------------------------
// abort

/// Aborts one communicator after the other, the last opened first.
class OneByOne final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void abort(std::span<const detail::NcclComm> comms) noexcept override {
    for (auto comm = comms.rbegin(); comm != comms.rend(); ++comm) inner_->abort({&*comm, 1});
  }
};

/// Rank 0 issues an all_to_all that its peer never joins, and a send that depends on it: the send's communicator cannot
/// end before that of the all_to_all.
std::vector<std::string> violations_of_an_abort(std::chrono::milliseconds patience, const Decorate& decorate) {
  const testing::NcclEmulation emulation(2, {.patience = patience});
  std::latch computed(2);
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{0, 1}, {1, 0}});
        Pending sent;
        if (rank.rank() == 0) {
          const Signature expected(2, {.dtype = at::kFloat, .sizes = {100}});
          const Tensors mixed = rank->all_to_all({rank.empty({100}), rank.empty({100})}, expected).take();
          at::Tensor made = rank.empty({100});
          rank.run(slow_fill(made, [mixed](std::int64_t) { return 1.0F; }, 0us));
          sent = rank->send(1, {std::move(made)});
        }
        computed.arrive_and_wait();
        if (rank.rank() == 1) rank->abort("enough");
        rank.synchronize();  // returns: nothing waits any more
        EXPECT_THROW(rank->barrier().wait(), CommError);
      },
      decorate);
  EXPECT_EQ(emulation.open_streams(), 0U);
  return emulation.violations();
}

TEST(Abort, EndsAStepWhoseTransfersWaitForACollective) { EXPECT_THAT(violations_of_an_abort(60s, nullptr), IsEmpty()); }

TEST(Abort, OfOneCommunicatorAfterTheOtherWouldHang) {
  const auto one_by_one = [](int, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
    nccl = std::make_shared<OneByOne>(nccl);
  };
  EXPECT_THAT(violations_of_an_abort(200ms, one_by_one), ::testing::Contains(HasSubstr("abort hangs")));
}

/// Touches the device before it aborts, as a guard that sets it would.
class GuardFirst final : public ForwardingNccl {
 public:
  GuardFirst(std::shared_ptr<detail::NcclApi> inner, std::shared_ptr<detail::DeviceApi> device)
      : ForwardingNccl(std::move(inner)), device_(std::move(device)) {}
  void abort(std::span<const detail::NcclComm> comms) noexcept override {
    device_->destroy(device_->create_event(false));
    inner_->abort(comms);
  }

 private:
  std::shared_ptr<detail::DeviceApi> device_;
};

/// Rank 0 waits for what its peer never sends, and loads code meanwhile: only an abort ends that.
std::vector<std::string> violations_while_code_is_loaded(std::chrono::milliseconds patience, const Decorate& decorate) {
  const testing::NcclEmulation emulation(2, {.patience = patience});
  std::latch launched(2);
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{1, 0}});
        const Signature expected{{.dtype = at::kFloat, .sizes = {100}}};
        if (rank.rank() == 1) rank->send(0, {rank.empty({100})}).wait();
        if (rank.rank() == 0) {
          rank->receive(1, expected).wait();  // from here on such a receive is launched without an announcement
          rank->receive(1, expected).wait();  // the device waits, and the watchdog looks after it
        }
        launched.arrive_and_wait();
        if (rank.rank() == 0) emulation.load_code(0);
        if (rank.rank() == 1) rank->abort("enough");
        EXPECT_THROW(rank->barrier().wait(), CommError);
      },
      decorate);
  return emulation.violations();
}

TEST(Abort, EndsOperationsForWhichLoadingCodeWaits) {
  EXPECT_THAT(violations_while_code_is_loaded(60s, nullptr), IsEmpty());
}

TEST(Abort, BehindTheContextsLockWouldHang) {
  const auto guard_first = [](int, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>& nccl) {
    nccl = std::make_shared<GuardFirst>(nccl, device);
  };
  // Whichever of the two waits loses its patience first.
  EXPECT_THAT(violations_while_code_is_loaded(300ms, guard_first),
              ::testing::Contains(::testing::AnyOf(HasSubstr("a call of the device waits for code that is loaded"),
                                                   HasSubstr("code is not loaded"))));
}

// ---------------------------------------------------------------------------------------------------------------------
// errors of the device on the rank's thread

class FaultyDevice final : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  void record(detail::DeviceEvent event, detail::DeviceStream stream) override {
    check();
    inner_->record(event, stream);
  }
  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override {
    check();
    inner_->wait(stream, event);
  }
  bool done(detail::DeviceEvent event) override {
    check();
    return inner_->done(event);
  }
  double time_of(detail::DeviceEvent event) override {
    check();
    return inner_->time_of(event);
  }
  std::atomic<bool> broken{false};

 private:
  void check() const {
    if (broken) throw detail::DeviceFailure("CUDA: an illegal memory access was encountered");
  }
};

/// One call, with an operation and a moment from before the device broke.
struct Use {
  std::string name;
  std::function<void(Communicator&, Pending&, const Moment&)> call;
};

class DeviceErrors : public ::testing::TestWithParam<Use> {};

TEST_P(DeviceErrors, AreCommErrorsAndEndAllRanks) {
  const testing::NcclEmulation emulation(2);
  std::shared_ptr<FaultyDevice> faulty;
  std::latch received(2);
  std::latch failed(2);
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& rank) {
        Communicator& comm = *rank.communicator;
        if (comm.rank() == 0) {
          Pending sent = comm.send(1, {torch::ones({5})});
          const auto moment = comm.device_trace()->mark();
          received.arrive_and_wait();
          faulty->broken = true;
          try {
            GetParam().call(comm, sent, *moment);
            ADD_FAILURE() << "nothing was thrown";
          } catch (const CommError& error) {
            EXPECT_EQ(error.origin_rank(), 0);
            EXPECT_THAT(error.what(), HasSubstr("CUDA: an illegal memory access was encountered"));
          }
          failed.arrive_and_wait();
        } else {
          EXPECT_TRUE(torch::equal(comm.receive(0).take().at(0), torch::ones({5})));
          received.arrive_and_wait();
          failed.arrive_and_wait();
        }
        EXPECT_THROW(comm.barrier().wait(), CommError);
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
        if (rank == 0) device = faulty = std::make_shared<FaultyDevice>(device);
      });
  expect_clean(emulation);
}

INSTANTIATE_TEST_SUITE_P(
    Calls, DeviceErrors,
    ::testing::Values(
        Use{"send", [](Communicator& comm, Pending&, const Moment&) { comm.send(1, {torch::ones({2})}); }},
        Use{"all_reduce", [](Communicator& comm, Pending&, const Moment&) { comm.all_reduce({torch::ones({2})}); }},
        Use{"broadcast", [](Communicator& comm, Pending&, const Moment&) { comm.broadcast({torch::ones({2})}, 0); }},
        Use{"fence", [](Communicator& comm, Pending&, const Moment&) { comm.fence(); }},
        Use{"mark", [](Communicator& comm, Pending&, const Moment&) { comm.device_trace()->mark(); }},
        Use{"reached", [](Communicator&, Pending&, const Moment& moment) { (void)moment.reached(); }},
        Use{"seconds", [](Communicator&, Pending&, const Moment& moment) { (void)moment.seconds(); }},
        Use{"wait", [](Communicator&, Pending& sent, const Moment&) { sent.wait(); }},
        Use{"synchronize", [](Communicator&, Pending& sent, const Moment&) { sent.synchronize(); }},
        Use{"done", [](Communicator&, Pending& sent, const Moment&) { (void)sent.done(); }},
        Use{"span", [](Communicator&, Pending& sent, const Moment&) { (void)sent.span(); }}),
    [](const auto& tested) { return tested.param.name; });

// ---------------------------------------------------------------------------------------------------------------------
// calls that do not return

/// Once armed, group_end() does not return before an abort, as when NCCL connects to a stopped rank.
class HangingNccl final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  void group_end() override {
    inner_->group_end();
    std::unique_lock lock(mutex_);
    if (!armed_) return;
    changed_.wait(lock, [this] { return aborted_; });
    throw detail::DeviceFailure("NCCL: the communicator was aborted");
  }
  void abort(std::span<const detail::NcclComm> comms) noexcept override {
    {
      const std::lock_guard lock(mutex_);
      aborted_ = true;
    }
    changed_.notify_all();
    inner_->abort(comms);
  }
  void arm() {
    const std::lock_guard lock(mutex_);
    armed_ = true;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool armed_ = false, aborted_ = false;
};

TEST(Deadline, EndsACallOfNcclThatDoesNotReturn) {
  const testing::NcclEmulation emulation(2);
  std::shared_ptr<HangingNccl> hanging;
  std::latch connected(2);
  std::latch failed(2);
  run_emulated(
      emulation, 2, {.timeout = 500ms},
      [&](const EmulatedRank& rank) {
        connected.arrive_and_wait();
        if (rank.communicator->rank() == 0) hanging->arm();
        try {
          Pending sum = rank.communicator->all_reduce({torch::ones({3})});
          if (rank.communicator->rank() == 1) failed.arrive_and_wait();  // rank 0's deadline comes first
          sum.wait();
          ADD_FAILURE() << "nothing was thrown";
        } catch (const CommError& error) {
          EXPECT_EQ(error.origin_rank(), 0);
          EXPECT_THAT(error.what(),
                      HasSubstr("NCCL has not come back from a call for longer than the timeout of 500 ms"));
        }
        if (rank.communicator->rank() == 0) failed.arrive_and_wait();
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
        if (rank == 0) nccl = hanging = std::make_shared<HangingNccl>(nccl);
      });
  expect_clean(emulation);
}

/// The first init() does not return before it is let go, as when another rank stops between the agreement and NCCL's
/// start.
class StuckInit final : public ForwardingNccl {
 public:
  using ForwardingNccl::ForwardingNccl;
  detail::NcclComm init(int, const detail::NcclId&, int, const detail::NcclConfig&) override {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return over_; });
    throw detail::DeviceFailure("never connected");
  }
  void let_go() {
    const std::lock_guard lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
};

TEST(Deadline, EndsAStartOfNcclThatDoesNotReturn) {
  const testing::NcclEmulation emulation(2);
  std::vector<std::shared_ptr<StuckInit>> stuck(2);
  const auto start = [&] {
    run_emulated(
        emulation, 2, {.timeout = 300ms}, [](const EmulatedRank& rank) { rank.communicator->barrier().wait(); },
        [&](int rank, std::shared_ptr<detail::DeviceApi>&, std::shared_ptr<detail::NcclApi>& nccl) {
          nccl = stuck[rank] = std::make_shared<StuckInit>(nccl);
        });
  };
  EXPECT_THAT(start, ::testing::ThrowsMessage<CommError>(HasSubstr("NCCL has not connected 2 ranks within")));
  for (const auto& each : stuck) each->let_go();
}

}  // namespace
}  // namespace dualpipe::test
