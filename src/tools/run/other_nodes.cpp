#include "tools/run/other_nodes.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <thread>
#include <utility>

#include "dualpipe/launch/world.hpp"
#include "launch/met_file.hpp"
#include "launch/secret.hpp"

namespace dualpipe::run {
namespace {

using namespace std::chrono_literals;

constexpr auto kTimeToTell = 10s;
/// Those who have met before are likely to know already.
constexpr auto kTimeToTellAgain = 1s;

}  // namespace

OtherNodes::OtherNodes(const Options& options, std::filesystem::path folder)
    : options_(options), folder_(std::move(folder)) {
  constexpr const char* variable = "DUALPIPE_SECRET_FILE";
  if (const char* const path = std::getenv(variable)) secret_ = detail::read_secret(variable, path);
}

std::filesystem::path OtherNodes::met_file(int rank) const {
  return folder_.empty() ? "" : folder_ / ("met" + std::to_string(rank));
}

void OtherNodes::tell(int absent, const detail::FailureReport& failure) {
  if (stand_in_) return;
  detail::Met met = detail::read_met(met_file(absent));
  if (have_given_up(failure, met.ranks)) return;
  met_before_ = met.before;
  World world;
  world.rank = absent;
  world.size = options_.nodes * options_.ranks;
  world.local_size = options_.ranks;
  world.master_address = options_.master_address;
  world.master_port = options_.master_port;
  world.run_id = options_.run_id;
  world.secret = secret_;
  stand_in_.emplace(std::move(world), std::move(met.ranks), failure, met_before_ ? kTimeToTellAgain : kTimeToTell);
}

/// The failure is that others have not come until the timeout, which is theirs as well.
bool OtherNodes::have_given_up(const detail::FailureReport& failure, const std::set<int>& met) const {
  return failure.operation == "rendezvous" && failure.origin >= 0 && node_of(failure.origin) != options_.node_rank &&
         std::none_of(met.begin(), met.end(), [&](int rank) { return node_of(rank) == node_of(failure.origin); });
}

bool OtherNodes::others_here_have_met() const {
  if (options_.node_rank == 0) return false;
  for (int rank = options_.node_rank * options_.ranks; rank < (options_.node_rank + 1) * options_.ranks; ++rank)
    if (!detail::read_met(met_file(rank)).ranks.empty()) return true;
  return false;
}

bool OtherNodes::is_over() const { return !stand_in_ || stand_in_->is_over() || others_here_have_met(); }

std::string OtherNodes::wants() const {
  return options_.node_rank == 0 ? "waits for up to 10 s for ranks of other nodes, to tell them why this one fails"
                                 : "looks for rank 0 for up to 10 s, to tell it why this node fails";
}

std::string OtherNodes::outcome() const {
  if (!stand_in_ || stand_in_->all_know() || others_here_have_met() || met_before_) return "";
  return options_.node_rank == 0 ? "not all nodes were told; ranks there that wait for rank 0 end at their timeout"
                                 : "found no rank 0; ranks that wait for those of this node end at their timeout";
}

void tell_that_none_starts(const Options& options, const std::string& reason) noexcept {
  try {
    OtherNodes others(options, "");
    const int first = options.node_rank * options.ranks;
    others.tell(first, {.message = reason, .rank = first, .origin = first, .operation = {}, .time_ns = 0});
    const auto begin = std::chrono::steady_clock::now();
    for (bool said = false; !others.is_over(); std::this_thread::sleep_for(10ms)) {
      if (said || std::chrono::steady_clock::now() - begin < kTimeToTellInSilence) continue;
      said = true;
      std::cerr << "dualpipe-run: no rank starts here; " << others.wants() << std::endl;
    }
  } catch (const std::exception&) {  // without a secret nobody would listen
  }
}

}  // namespace dualpipe::run
