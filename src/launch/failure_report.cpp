#include "launch/failure_report.hpp"

#include <nlohmann/json.hpp>

namespace dualpipe::detail {

std::string to_json(const FailureReport& report) {
  // torchrun calls the rank with the smallest timestamp the root cause, in whole seconds, the lowest rank of several.
  // One that was killed, or is stopped, writes nothing and gets the time at which torchrun sees its end, which is 30 s
  // after it has begun to end the others. So that it is the cause then, consequences count as later.
  constexpr std::int64_t second_ns = 1'000'000'000, later_s = 60;
  const bool is_consequence = report.origin >= 0 && report.origin != report.rank;
  const std::int64_t timestamp = report.time_ns / second_ns + (is_consequence ? later_s : 0);
  const nlohmann::json json = {
      {"message", {{"message", report.message}, {"extraInfo", {{"timestamp", std::to_string(timestamp)}}}}},
      {"rank", report.rank},
      {"origin", report.origin},
      {"operation", report.operation},
      {"time_ns", report.time_ns}};
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string absence_of(const FailureReport& report) {
  if (report.origin >= 0 && report.origin != report.rank) return report.message;  // it has been told itself
  const std::string name = "rank " + std::to_string(report.rank);
  std::string reason = report.message;
  if (reason.starts_with(name + ": ")) reason.erase(0, name.size() + 2);
  return name + " ended before it met the others: " + reason;
}

std::optional<FailureReport> failure_report_from(const std::string& json) {
  try {
    const nlohmann::json parsed = nlohmann::json::parse(json);
    return FailureReport{.message = parsed.at("message").at("message").get<std::string>(),
                         .rank = parsed.at("rank").get<int>(),
                         .origin = parsed.at("origin").get<int>(),
                         .operation = parsed.at("operation").get<std::string>(),
                         .time_ns = parsed.at("time_ns").get<std::int64_t>()};
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
}

}  // namespace dualpipe::detail
