#include "launch/failure_report.hpp"

#include <nlohmann/json.hpp>

namespace dualpipe::detail {

std::string to_json(const FailureReport& report) {
  constexpr std::int64_t nanoseconds = 1'000'000'000;
  const nlohmann::json json = {
      // torchrun's part: it shows the message of the rank with the smallest timestamp.
      {"message",
       {{"message", report.message}, {"extraInfo", {{"timestamp", std::to_string(report.time_ns / nanoseconds)}}}}},
      {"rank", report.rank},
      {"origin", report.origin},
      {"operation", report.operation},
      {"time_ns", report.time_ns}};
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
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
