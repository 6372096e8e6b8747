// A rank of a job that fails, without the job: what each rank reports is what a step would make it throw.
//   failing_rank HOW CULPRIT [SEED]
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "dualpipe/error.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/launch/world.hpp"
#include "launch/met_file.hpp"

namespace dualpipe {
namespace {

/// For as long as a rank may need more than another to notice, to report, or to end.
class Delays {
 public:
  explicit Delays(unsigned seed) : random_(seed) {}
  void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(random_() % 20)); }

 private:
  std::mt19937 random_;
};

[[noreturn]] void hang() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

[[noreturn]] void fail(const std::string& how, int culprit, int rank) {
  if (rank != culprit)
    throw CommError(culprit, "receive from " + std::to_string(culprit),
                    detail::str("rank ", rank, ": receive from ", culprit, ": failed because of rank ", culprit));
  if (how == "throws") throw std::runtime_error("the loss is gone\nin a second line");
  if (how == "aborts") throw CommError(rank, "step 3", detail::str("rank ", rank, ": a bad token"));
  if (how == "killed") std::raise(SIGKILL);
  if (how == "stopped") std::raise(SIGSTOP);
  if (how == "left") std::exit(0);
  if (how == "throws-and-hangs") {
    report_failure(World::from_env(), std::runtime_error("the loss is gone"));
    hang();
  }
  hang();
}

int run(const std::string& how, int culprit, unsigned seed) {
  const World world = World::from_env();
  for (int rank = 0; rank < world.size; ++rank) detail::note_met(detail::met_file(world), rank);
  Delays delays(seed * 1000 + static_cast<unsigned>(world.rank));
  delays.pause();
  if (how == "alone" && world.rank != culprit) hang();
  if (how == "throws-and-hangs" && world.rank != culprit) {
    const auto folder = std::filesystem::path(world.error_file).parent_path();
    while (!std::filesystem::exists(folder / detail::str("error", culprit, ".json"))) delays.pause();
  }
  try {
    fail(how == "alone" ? "throws" : how, culprit, world.rank);
  } catch (const std::exception& error) {
    delays.pause();
    report_failure(world, error);
    delays.pause();
    return 10 + world.rank;
  }
}

}  // namespace
}  // namespace dualpipe

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  return dualpipe::run(argv[1], std::stoi(argv[2]), argc > 3 ? static_cast<unsigned>(std::stoul(argv[3])) : 0U);
}
