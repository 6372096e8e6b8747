// A program that is killed while it saves leaves a checkpoint that is complete, whenever that happens.
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <random>
#include <string>
#include <thread>

#include "dualpipe/train/checkpoint.hpp"
#include "launch/process.hpp"
#include "temporary_folder.hpp"
#include "train/seeded_run.hpp"

namespace dualpipe {
namespace {

using test::Whole;

void kill_at_random_moments(const std::string& mode, unsigned seed, int kills) {
  const test::TemporaryFolder folder;
  std::mt19937 random(seed);
  std::int64_t last = 0;
  for (int kill = 0; kill < kills; ++kill) {
    SCOPED_TRACE("kill " + std::to_string(kill) + " of seed " + std::to_string(seed));
    {
      testing::Process saver({SAVER, folder.path().string(), mode});
      // The second save of a process has a complete checkpoint before it.
      ASSERT_TRUE(saver.wait_for_output("saving " + std::to_string(last + 2))) << saver.err();
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 60'000));
      saver.signal(SIGKILL);
      ASSERT_EQ(saver.wait(), 128 + SIGKILL) << saver.err();
    }
    Whole found;
    torch::optim::AdamW found_optimizer(found->parameters());
    const std::int64_t step = load_checkpoint(folder.path(), found, found_optimizer).step;
    ASSERT_GT(step, last);

    Whole expected;
    torch::optim::AdamW optimizer(expected->parameters());
    for (int each = 1; each <= step; ++each) test::seeded_step(*expected, optimizer, each);
    test::expect_same_weights(*found, test::weights_of(*expected));
    test::seeded_step(*expected, optimizer, static_cast<int>(step) + 1);
    test::seeded_step(*found, found_optimizer, static_cast<int>(step) + 1);
    test::expect_same_weights(*found, test::weights_of(*expected));
    last = step;
  }
}

TEST(CheckpointKill, OneProcessLeavesACompleteCheckpoint) { kill_at_random_moments("alone", 11, 25); }
TEST(CheckpointKill, RanksThatWriteInTheBackgroundLeaveACompleteCheckpoint) { kill_at_random_moments("ranks", 12, 25); }

}  // namespace
}  // namespace dualpipe
