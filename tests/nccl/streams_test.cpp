#include <gtest/gtest.h>
#include <torch/torch.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <set>

#include "async_rank.hpp"

// Operations that are waited for on another stream than they were called on.
namespace dualpipe::test {
namespace {

using namespace std::chrono_literals;

constexpr std::int64_t kElements = 3000;

float value_of(int from, int to) { return static_cast<float>(10 * from + to + 1); }

/// A second stream of a rank.
class SideStream {
 public:
  explicit SideStream(const EmulatedRank& rank) : rank_(rank), stream_(rank.device->create_stream()) {}
  ~SideStream() {
    rank_.emulation.synchronize(stream_);
    rank_.device->destroy(stream_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  detail::DeviceStream get() const { return stream_; }
  void run(std::function<void()> kernel) const { rank_.emulation.run(stream_, std::move(kernel)); }
  void synchronize() const { rank_.emulation.synchronize(stream_); }
  template <class Call>
  auto while_current(const AsyncRank& rank, const Call& call) const {
    rank_.emulation.set_current(rank.rank(), stream_);
    auto result = call();
    rank_.emulation.set_current(rank.rank(), rank.stream());
    return result;
  }

 private:
  EmulatedRank rank_;
  detail::DeviceStream stream_;
};

/// What is sent is still being computed when the other stream waits, and its memory is written again as soon as it is
/// given back.
int wrong_values_of_all_to_all(Communicator& group, const AsyncRank& rank, const SideStream& side) {
  std::atomic<int> wrong{0};
  const int me = group.rank();
  for (int round = 0; round < 5; ++round) {
    Tensors outgoing;
    for (int to = 0; to < group.size(); ++to) {
      outgoing.push_back(rank.empty({kElements}));
      rank.run(slow_fill(outgoing.back(), [=](std::int64_t) { return value_of(me, to); }, 500us));
    }
    Pending mixed = group.all_to_all(std::move(outgoing));
    const Tensors got = side.while_current(rank, [&] { return mixed.take(); });
    for (int i = 0; i < 3 * group.size(); ++i) {
      const at::Tensor again = rank.empty({kElements});
      rank.run(slow_fill(again, [](std::int64_t) { return -1.0F; }, 0us));
    }
    side.run([&wrong, got, me] {
      std::this_thread::sleep_for(300us);
      for (std::size_t from = 0; from < got.size(); ++from)
        for (std::int64_t i = 0; i < kElements; ++i)
          if (got[from].const_data_ptr<float>()[i] != value_of(static_cast<int>(from), me)) ++wrong;
    });
    side.synchronize();
  }
  return wrong;
}

TEST(TwoStreams, AllToAllIsInOrderWithBoth) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const testing::NcclEmulation emulation(2, {.seed = seed});
    run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
      const AsyncRank rank(emulated);
      const SideStream side(emulated);
      EXPECT_EQ(wrong_values_of_all_to_all(*rank, rank, side), 0) << "seed " << seed;
      rank->barrier().wait();
    });
    expect_clean(emulation);
  }
}

TEST(TwoStreams, SoItIsInAGroupOfOne) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const testing::NcclEmulation emulation(2, {.seed = seed});
    run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
      const AsyncRank rank(emulated);
      const SideStream side(emulated);
      const auto alone = rank->split(rank.rank(), 0);
      EXPECT_EQ(wrong_values_of_all_to_all(*alone, rank, side), 0) << "seed " << seed;
      rank->barrier().wait();
    });
    expect_clean(emulation);
  }
}

/// Remembers which stream has waited for which.
class OrderedDevice final : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  void record(detail::DeviceEvent event, detail::DeviceStream stream) override {
    inner_->record(event, stream);
    const std::lock_guard lock(mutex_);
    recorded_[event] = stream;
  }
  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override {
    inner_->wait(stream, event);
    const std::lock_guard lock(mutex_);
    waited_.insert({stream, recorded_.at(event)});
  }
  bool has_waited(detail::DeviceStream stream, detail::DeviceStream for_stream) const {
    const std::lock_guard lock(mutex_);
    return waited_.contains({stream, for_stream});
  }

 private:
  mutable std::mutex mutex_;
  std::map<detail::DeviceEvent, detail::DeviceStream> recorded_;
  std::set<std::pair<detail::DeviceStream, detail::DeviceStream>> waited_;
};

// The emulation's copies of strided tensors are the host's and at once, so that only the order can be seen.
TEST(TwoStreams, TheCopyBackOfAStridedTensorIsInOrderWithBoth) {
  const testing::NcclEmulation emulation(2);
  std::array<std::shared_ptr<OrderedDevice>, 2> devices;
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        const SideStream side(emulated);
        const at::Tensor strided = torch::ones({30, 20}).t();
        Pending sum = rank->all_reduce({strided});
        while (!sum.done()) std::this_thread::sleep_for(100us);
        side.while_current(rank, [&] { return sum.take(); });
        EXPECT_TRUE((strided == 2).all().item<bool>());
        const OrderedDevice& device = *devices.at(static_cast<std::size_t>(rank.rank()));
        EXPECT_TRUE(device.has_waited(side.get(), rank.stream())) << "for what the tensor was";
        EXPECT_TRUE(device.has_waited(rank.stream(), side.get())) << "for the copy";
        rank->barrier().wait();
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
        device = devices.at(static_cast<std::size_t>(rank)) = std::make_shared<OrderedDevice>(device);
      });
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
