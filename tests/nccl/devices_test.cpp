#include "nccl/devices.hpp"

#include <gmock/gmock.h>
#include <torch/torch.h>

#include <atomic>

#include "dualpipe/comm/nccl.hpp"
#include "emulated.hpp"
#include "nccl/cuda.hpp"

namespace dualpipe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
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
  test::run_emulated(emulation, 2, {.timeout = 20s}, [](const test::EmulatedRank& rank) {
    Communicator& comm = *rank.communicator;
    const int peer = 1 - comm.rank();
    try {
      comm.send(peer, {torch::ones({2}), torch::empty({2}, at::kMeta)});
      ADD_FAILURE() << "nothing was thrown";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(),
                  AllOf(HasSubstr("tensor 1 is on meta"), HasSubstr("tensors of cpu"), HasSubstr(".to(")));
    }
    EXPECT_THROW(comm.all_reduce({torch::ones({2}).to_sparse()}), InvalidArgument);
    // A view that is not contiguous arrives all the same, though the sender drops everything at once.
    const auto table = torch::arange(12).reshape({3, 4});
    if (comm.rank() == 0) {
      comm.send(1, {table.clone().t()});
    } else {
      EXPECT_TRUE(torch::equal(comm.receive(0).take().at(0), table.t()));
    }
    comm.barrier().wait();
  });
  test::expect_clean(emulation);
}

TEST(NcclTensors, SumsOfWhatNcclDoesNotAddUp) {
  const testing::NcclEmulation emulation(3);
  test::run_emulated(emulation, 3, {.timeout = 20s}, [](const test::EmulatedRank& rank) {
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
  test::expect_clean(emulation);
}

TEST(NcclSignatures, WhatWasAgreedOnOnceIsLaunchedAtOnceAndStillCompared) {
  const testing::NcclEmulation emulation(2);
  std::atomic<int> failed{0};
  const auto body = [&](const test::EmulatedRank& rank) {
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
  test::run_emulated(emulation, 2, {.timeout = 20s}, body);
  EXPECT_EQ(failed, 2);
}

TEST(NcclOptionsTest, AnUnknownControlPlaneIsRefused) {
  const testing::NcclEmulation emulation(1);
  EXPECT_THROW(detail::NcclCommunicator::world(nullptr, emulation.device(0), emulation.nccl(0), {}), InvalidArgument);
}

}  // namespace
}  // namespace dualpipe
