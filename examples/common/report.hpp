#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dualpipe/planner/report.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/schedule/simulate.hpp"

namespace example {

/// As sprintf, up to 255 characters.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

/// The schedule as it would run if a weight gradient cost as much as a forward, and the bubble that leaves.
std::string picture(const dualpipe::Schedule& schedule, dualpipe::Publish publish);

/// The part of the ranks' time in which they do not compute, on average.
double bubble_share(const dualpipe::planner::Report& report);

/// Predicted beside measured, rank by rank: busy, bubble, activations, communication and how much of it was hidden.
/// @param cores  of this host, for `local_ranks` ranks; 0 where these compute on devices of their own.
std::string comparison(const dualpipe::Timeline& predicted, const dualpipe::Timeline& measured,
                       const dualpipe::Costs& costs, int local_ranks, int cores);

/// Where the time of each rank went in a measured step, and how much of what its stages communicate was hidden: in the
/// whole step, and in the main part, in which every rank has pairs. Empty where stages do not communicate.
std::string overlap(const dualpipe::Timeline& measured);

/// What a router did in a step, by expert.
struct Routing {
  std::vector<std::int64_t> tokens;      ///< that went there, of all ranks
  std::vector<std::int64_t> bias_steps;  ///< by how many steps the expert's bias has been raised since the run began
};
using Routings = std::map<std::string, Routing>;  // by the router's name

/// A table of them: the tokens of each expert in the first step and in the last, and how its bias has changed.
std::string routing_table(const std::string& router, const Routing& first, const Routing& last);

/// How far a run is, on stdout: on a terminal one line that is overwritten, elsewhere a line now and then.
class Progress {
 public:
  /// @param seconds  between lines; 0: every one, also on a terminal.
  explicit Progress(double seconds);

  /// The first line is always shown.
  void show(std::string line);
  /// Shows the last line, if it was not, and leaves it.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;

  std::chrono::duration<double> interval_;
  bool overwrites_;
  std::string pending_;  ///< empty: the last line has been shown and ended
  std::optional<Clock::time_point> shown_;
};

/// Makes the folder that `path` lies in. @throws dualpipe::InvalidArgument  where that is not possible.
void prepare_folder(const std::filesystem::path& path);

/// "1:05" of 65 seconds.
std::string minutes(double seconds);

}  // namespace example
