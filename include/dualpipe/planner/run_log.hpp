#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace dualpipe::planner {

/// What a run wrote step by step: a JSON object on each line, as {"step": 12, "loss": 1.5, "learning_rate": 0.001}.
struct RunLog {
  std::string name;
  std::vector<std::int64_t> steps;                    ///< ascending
  std::map<std::string, std::vector<double>> values;  ///< of each other member, by step; NaN: null, or not there
};

/// @param name  of the run, which errors show.
/// @throws InvalidArgument  naming the line: one that is no such object, has another value than a number or null, or a
///                          step that is not greater than that before.
RunLog read_run_log(std::string_view text, std::string name);

/// Losses over steps, below it learning rates and norms of gradients, those of all runs in one picture. Of long runs the
/// least and the greatest value in each pixel are drawn.
///
/// @throws InvalidArgument  no run, or none of these values in any.
std::string to_svg(const std::vector<RunLog>& runs);

}  // namespace dualpipe::planner
