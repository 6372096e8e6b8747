// Local ranks that share a device, over one that runs everything as late and in as strange an order as streams and
// events permit: anything read too early or too late has wrong values.
#include <c10/core/StreamGuard.h>
#include <gmock/gmock.h>
#include <torch/torch.h>

#include <array>
#include <mutex>
#include <random>

#include "comm/late_device.hpp"
#include "dualpipe/comm/local.hpp"
#include "dualpipe/pipeline/group_collectives.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;
using Ptr = std::shared_ptr<Communicator>;

constexpr std::uint64_t first_seed = 20261125;
constexpr int num_seeds = 40;

at::Tensor on_device(std::int64_t size, float value) { return torch::full({size}, value).to(late_device); }

/// Two streams of a rank, one of them current.
class Streams {
 public:
  explicit Streams(std::uint64_t seed) : random_(seed) {}
  bool chance(int of) { return random_() % static_cast<std::uint64_t>(of) == 0; }
  /// Makes one of them current.
  const c10::Stream& choose() {
    const c10::Stream& chosen = streams_[random_() % 2];
    guard_.reset_stream(chosen);
    return chosen;
  }
  void use(const c10::Stream& stream) { guard_.reset_stream(stream); }

 private:
  std::mt19937_64 random_;
  std::array<c10::Stream, 2> streams_{new_late_stream(), new_late_stream()};
  c10::StreamGuard guard_{streams_[0]};
};

/// Runs the body with every seed, on ranks with streams of their own.
void run(int num_ranks, const std::function<void(const Ptr&, Streams&)>& body) {
  for (int i = 0; i < num_seeds && !::testing::Test::HasFailure(); ++i) {
    const std::uint64_t seed = first_seed + static_cast<std::uint64_t>(i);
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    restart_late_device(seed);
    run_ranks(num_ranks,
              [&](Ptr comm) {
                Streams streams(seed * 100 + static_cast<std::uint64_t>(comm->rank()));
                body(comm, streams);
                comm->barrier().wait();
              },
              {.timeout = 20s, .device = late_device});
    finish_late_device();
  }
}

/// A tensor made on a stream, checked when all work is queued.
struct Result {
  c10::Stream stream;
  at::Tensor tensor;
  float value;
};
void check(const std::vector<Result>& results, Streams& streams) {
  for (const Result& result : results) {
    streams.use(result.stream);
    const at::Tensor got = result.tensor.cpu();
    EXPECT_TRUE((got == result.value).all().item<bool>()) << "expected " << result.value << ", got " << got[0];
  }
}

TEST(LateDevice, RunsWhatItIsGivenOnlyWhenSomebodyLooks) {
  restart_late_device(first_seed);
  const c10::StreamGuard guard(new_late_stream());
  const at::Tensor tensor = on_device(4, 7);
  EXPECT_NE(*static_cast<const float*>(tensor.const_data_ptr()), 7);
  EXPECT_TRUE(torch::equal(tensor.cpu(), torch::full({4}, 7.0F)));
}

TEST(LateDevice, AReaderOnAnotherStreamThatDoesNotWaitSeesSomethingElse) {
  int wrong = 0;
  for (int i = 0; i < num_seeds; ++i) {
    restart_late_device(first_seed + static_cast<std::uint64_t>(i));
    const c10::StreamGuard first(new_late_stream());
    const at::Tensor tensor = on_device(4, 7);
    const c10::StreamGuard second(new_late_stream());
    wrong += torch::equal(tensor.clone().cpu(), torch::full({4}, 7.0F)) ? 0 : 1;
  }
  EXPECT_GT(wrong, num_seeds / 4);
}

TEST(LocalOnADevice, TransfersBringWhatWasSentWhateverStreamsAreCurrent) {
  run(2, [](const Ptr& comm, Streams& streams) {
    const int me = comm->rank();
    std::vector<Result> results;
    struct Sent {
      Pending pending;
      c10::Stream stream;
      at::Tensor kept;
    };
    std::vector<Sent> sent;
    for (int k = 0; k < 30; ++k) {
      const auto value = static_cast<float>(k + 1);
      const c10::Stream stream = streams.choose();
      if (k % 2 == me) {
        at::Tensor tensor = on_device(3, value);
        Sent one{{}, stream, streams.chance(2) ? tensor : at::Tensor()};
        one.pending = comm->send(1 - me, {std::move(tensor)});
        if (!streams.chance(4)) sent.push_back(std::move(one));  // some are dropped at once
      } else {
        Pending pending = comm->receive(1 - me);
        const c10::Stream taker = streams.choose();
        at::Tensor got = pending.take().at(0);
        if (streams.chance(2)) got = got.clone();  // and what came is given back
        results.push_back({taker, std::move(got), value});
      }
      while (!sent.empty() && streams.chance(2)) {
        Sent one = std::move(sent.back());
        sent.pop_back();
        streams.use(one.stream);
        one.pending.wait();
        if (one.kept.defined()) one.kept.copy_(torch::full({3}, -1.0F));  // allowed from now on
        if (streams.chance(2)) on_device(3, -2);                          // into memory that was given back
      }
    }
    check(results, streams);
    for (Sent& one : sent) one.pending.wait();
  });
}

TEST(LocalOnADevice, CollectivesMatchTheClosedFormWhateverStreamsAreCurrent) {
  run(3, [](const Ptr& comm, Streams& streams) {
    const int size = comm->size();
    const auto me = static_cast<float>(comm->rank());
    std::vector<Result> results;
    for (int k = 0; k < 12; ++k) {
      const auto base = static_cast<float>(10 * k);
      streams.choose();
      at::Tensor tensor = on_device(3, base + me);
      Pending pending;
      float expected = 0;
      switch (k % 3) {
        case 0:
          pending = comm->all_reduce({tensor});
          expected = static_cast<float>(size) * base + static_cast<float>(size * (size - 1) / 2);
          break;
        case 1:
          pending = comm->broadcast({tensor}, k % size);
          expected = base + static_cast<float>(k % size);
          break;
        default:
          pending = comm->all_gather(std::move(tensor));
          break;
      }
      const c10::Stream waiter = streams.choose();
      Tensors got = pending.take();
      pending = Pending();
      for (int r = 0; r < static_cast<int>(got.size()); ++r)
        results.push_back({waiter, std::move(got[static_cast<std::size_t>(r)]),
                           k % 3 == 2 ? base + static_cast<float>(r) : expected});
    }
    check(results, streams);
  });
}

TEST(LocalOnADevice, MemoryChangesHandsOnlyBetweenThreadsWithOneStream) {
  for (const bool same : {true, false}) {
    restart_late_device(first_seed);
    const std::array<c10::Stream, 2> streams{new_late_stream(), new_late_stream()};
    std::array<const void*, 2> address{};
    run_ranks(2,
              [&](Ptr comm) {
                const auto me = static_cast<std::size_t>(comm->rank());
                const c10::StreamGuard guard(streams[same ? 0 : me]);
                if (me == 0) {
                  at::Tensor tensor = on_device(3, 5);
                  address[0] = tensor.const_data_ptr();
                  Pending sent = comm->send(1, {std::move(tensor)});
                  comm->barrier().wait();  // this thread has no reference left
                  sent.wait();
                } else {
                  comm->barrier().wait();
                  const at::Tensor got = comm->receive(0).take().at(0);
                  address[1] = got.const_data_ptr();
                  EXPECT_TRUE(torch::equal(got.cpu(), torch::full({3}, 5.0F)));
                }
                comm->barrier().wait();
              },
              {.timeout = 20s, .device = late_device});
    EXPECT_EQ(address[0] == address[1], same);
  }
}

/// all_to_all of splits alone: kinds of rows of which none is there.
struct SplitsRun {
  int wrong = 0;       ///< of all seeds
  int host_waits = 0;  ///< of the last launch
  bool ran_later_work = false;
};
SplitsRun exchange_of_splits(bool prepares) {
  SplitsRun seen;
  for (int i = 0; i < num_seeds; ++i) {
    restart_late_device(first_seed + static_cast<std::uint64_t>(i));
    const c10::StreamGuard guard(new_late_stream());
    const auto collective = all_to_all(local_communicators(1, {.device = late_device})[0]);
    const at::Tensor numbers = torch::tensor({std::int64_t{3}, std::int64_t{0}, std::int64_t{4}}).view({1, 1, 3});
    const at::Tensor splits = numbers.to(late_device);
    StageContext context;
    if (prepares) context.prepared = collective->prepare({at::Tensor(), splits});
    const auto value = static_cast<float>(100 + i);
    const at::Tensor later = on_device(4, value);
    take_late_host_waits();
    Collective::Launched launched;
    try {
      launched = collective->forward({at::Tensor(), splits}, context);
    } catch (const Error&) {
      ++seen.wrong;
      finish_late_device();
      continue;
    }
    seen.host_waits = take_late_host_waits();
    seen.ran_later_work = seen.ran_later_work || *static_cast<const float*>(later.const_data_ptr()) == value;
    const at::Tensor came = launched.pending.take()[1];
    EXPECT_TRUE(came.is_cpu());
    seen.wrong += torch::equal(came, torch::cat({numbers, numbers})) ? 0 : 1;
    finish_late_device();
  }
  return seen;
}

TEST(SplitsOnADevice, TheHostWaitsForTheirCopyAlone) {
  const SplitsRun prepared = exchange_of_splits(true);
  EXPECT_EQ(prepared.wrong, 0);
  EXPECT_EQ(prepared.host_waits, 1);
  EXPECT_FALSE(prepared.ran_later_work) << "what was queued between prepare() and forward() runs on";
}

TEST(SplitsOnADevice, WithoutPreparationTheHostWaitsForAllThatWasQueued) {
  const SplitsRun unprepared = exchange_of_splits(false);
  EXPECT_EQ(unprepared.wrong, 0);
  EXPECT_EQ(unprepared.host_waits, 1);
  EXPECT_TRUE(unprepared.ran_later_work);
}

TEST(SplitsOnADevice, AHostThatDoesNotWaitReadsSomethingElse) {
  late_host_waits_for_events(false);
  EXPECT_GT(exchange_of_splits(true).wrong, 0);
  late_host_waits_for_events(true);
}

TEST(LocalOnADevice, TellsWhereItIsAndRefusesTensorsOfAnotherDevice) {
  restart_late_device(first_seed);
  const auto ranks = local_communicators(2, {.device = at::Device(late_device.type())});
  EXPECT_EQ(ranks[0]->device(), late_device);
  try {
    ranks[0]->send(1, {torch::ones({2})});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("tensor 0 of the message is on cpu"), HasSubstr("privateuseone:0")));
  }
}

TEST(LocalOnADevice, DevicesThatAreNotThereAreRefused) {
  EXPECT_THROW(local_communicators(2, {.device = at::Device(late_device.type(), 1)}), InvalidArgument);
  try {
    local_communicators(2, {.device = at::kCUDA});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("cuda"), HasSubstr("dualpipe::nccl")));
  }
}

}  // namespace
}  // namespace dualpipe::test
