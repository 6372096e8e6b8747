#include "dualpipe/planner/trace.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/pass_name.hpp"
#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::planner {
namespace {

using nlohmann::json;

/// By Lane. A lane is a thread of the process that stands for its rank.
constexpr std::array<const char*, 6> lane_names{"compute", "send", "receive", "collective", "node", "reduction"};

/// Times of a trace are microseconds; one abstract unit is shown as one millisecond.
double microseconds_per_unit(double seconds_per_unit) { return seconds_per_unit == 0 ? 1e3 : seconds_per_unit * 1e6; }

const char* category(const Step& step) { return step.overlapped ? "overlapped" : detail::pass_name(step.op.pass); }

json metadata(const char* what, int pid, int tid, const json& args) {
  return {{"name", what}, {"ph", "M"}, {"pid", pid}, {"tid", tid}, {"args", args}};
}

/// A member of one of our own events; what is missing or of another type is an error that names the event.
template <class T>
T member(const json& object, const char* key, std::size_t event) {
  const auto found = object.find(key);
  bool fits = found != object.end();
  if constexpr (std::is_same_v<T, double>)
    fits = fits && found->is_number();
  else if constexpr (std::is_same_v<T, int>)
    fits = fits && found->is_number_integer() && std::abs(found->template get<double>()) <= 1e9;  // get<int> would wrap
  else
    fits = fits && found->is_string();
  DUALPIPE_CHECK(fits, "trace event ", event, ": ", found == object.end() ? "lacks" : "has a wrong type for", " \"",
                 key, "\"");
  return found->template get<T>();
}

Interval read_interval(const json& event, const json& args, std::size_t index, int num_ranks) {
  Interval interval;
  interval.rank = member<int>(event, "pid", index);
  DUALPIPE_CHECK(interval.rank >= 0 && interval.rank < num_ranks, "trace event ", index, ": rank (pid) ", interval.rank,
                 " of ", num_ranks);
  const int lane = member<int>(event, "tid", index);
  DUALPIPE_CHECK(lane >= 0 && lane < static_cast<int>(lane_names.size()), "trace event ", index, ": lane (tid) ", lane,
                 ", expected 0 to ", lane_names.size() - 1);
  interval.lane = static_cast<Lane>(lane);
  try {
    interval.step = parse_step(member<std::string>(args, "op", index));
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(detail::str("trace event ", index, ": ", error.what()));
  }
  interval.begin = member<double>(args, "begin", index);
  interval.end = member<double>(args, "end", index);
  if (args.contains("node")) interval.node = member<std::string>(args, "node", index);
  DUALPIPE_CHECK(std::isfinite(interval.begin) && std::isfinite(interval.end) && interval.begin <= interval.end,
                 "trace event ", index, ": lasts from ", interval.begin, " to ", interval.end);
  return interval;
}

std::vector<StageSize> read_sizes(const json& stages) {
  DUALPIPE_CHECK(stages.is_array(), "trace: otherData has \"stages\" that are no list");
  std::vector<StageSize> sizes;
  for (const json& stage : stages) {
    const auto amount = [&](const char* key) {
      const bool is_number = stage.is_object() && stage.contains(key) && stage[key].is_number();
      const double value = is_number ? stage[key].get<double>() : -1;
      DUALPIPE_CHECK(std::isfinite(value) && value >= 0, "trace: otherData: stage ", sizes.size(), " needs \"", key,
                     "\", a number that is not negative");
      return value;
    };
    sizes.push_back({.parameters = amount("parameters"), .bytes = amount("bytes")});
  }
  return sizes;
}

}  // namespace

std::string to_trace(const Timeline& timeline) {
  const double scale = microseconds_per_unit(timeline.seconds_per_unit);
  const auto dumped = [](const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); };

  // Written event by event, one per line: a tree of all of them would take many times the memory of the text.
  json other{
      {"name", timeline.name}, {"num_ranks", timeline.num_ranks}, {"seconds_per_unit", timeline.seconds_per_unit}};
  for (const StageSize& stage : timeline.stages)
    other["stages"].push_back({{"parameters", stage.parameters}, {"bytes", stage.bytes}});
  std::string out = "{\"displayTimeUnit\":\"ms\",\"otherData\":" + dumped(other) + ",\"traceEvents\":[";
  const char* separator = "\n";
  const auto add = [&](const json& event) {
    out += separator + dumped(event);
    separator = ",\n";
  };
  for (int rank = 0; rank < timeline.num_ranks; ++rank) {
    add(metadata("process_name", rank, 0, {{"name", "rank " + std::to_string(rank)}}));
    add(metadata("process_sort_index", rank, 0, {{"sort_index", rank}}));
  }
  std::vector<std::array<bool, lane_names.size()>> named(timeline.num_ranks);
  for (const Interval& interval : timeline.intervals) {
    DUALPIPE_CHECK(interval.rank >= 0 && interval.rank < timeline.num_ranks, "an interval of rank ", interval.rank,
                   " in a timeline of ", timeline.num_ranks, " ranks");
    const auto lane = static_cast<int>(interval.lane);
    bool& is_named = named[interval.rank][lane];
    if (!is_named) add(metadata("thread_name", interval.rank, lane, {{"name", lane_names[lane]}}));
    is_named = true;
    const std::string text = to_string(interval.step);
    json args{{"op", text}, {"begin", interval.begin}, {"end", interval.end}};
    if (!interval.node.empty()) args["node"] = interval.node;
    add({{"name", interval.node.empty() ? text : text + " " + interval.node},
         {"cat", interval.lane == Lane::compute ? category(interval.step) : lane_names[lane]},
         {"ph", "X"},
         {"ts", interval.begin * scale},
         {"dur", (interval.end - interval.begin) * scale},
         {"pid", interval.rank},
         {"tid", lane},
         {"args", std::move(args)}});
  }
  return out + "\n]}\n";
}

Timeline from_trace(std::string_view text) {
  const json root = detail::parse_json(text);
  DUALPIPE_CHECK(
      root.is_object() && root.contains("traceEvents") && root["traceEvents"].is_array() && root.contains("otherData"),
      "not a trace of this library: expected an object with \"otherData\" and an array \"traceEvents\"");
  const json& other = root["otherData"];
  const auto number = [&](const char* key) {
    DUALPIPE_CHECK(other.is_object() && other.contains(key) && other[key].is_number(),
                   "not a trace of this library: otherData lacks the number \"", key, "\"");
    return other[key].get<double>();
  };
  Timeline timeline;
  const double num_ranks = number("num_ranks");
  // A rank is at least one event of its own: its name.
  DUALPIPE_CHECK(num_ranks >= 0 && num_ranks == std::floor(num_ranks) &&
                     num_ranks <= static_cast<double>(root["traceEvents"].size()),
                 "the trace claims ", num_ranks, " ranks in ", root["traceEvents"].size(), " events");
  timeline.num_ranks = static_cast<int>(num_ranks);
  timeline.seconds_per_unit = number("seconds_per_unit");
  DUALPIPE_CHECK(std::isfinite(timeline.seconds_per_unit) && timeline.seconds_per_unit >= 0,
                 "seconds_per_unit must not be negative, got ", timeline.seconds_per_unit);
  if (other.contains("name") && other["name"].is_string()) timeline.name = other["name"].get<std::string>();

  if (other.contains("stages")) timeline.stages = read_sizes(other["stages"]);

  std::size_t index = 0;
  for (const json& event : root["traceEvents"]) {
    DUALPIPE_CHECK(event.is_object(), "trace event ", index, ": expected an object");
    // Others may have added events; ours are complete events that name an op.
    const auto phase = event.find("ph");
    const auto args = event.find("args");
    if (phase != event.end() && *phase == "X" && args != event.end() && args->is_object() && args->contains("op"))
      timeline.intervals.push_back(read_interval(event, *args, index, timeline.num_ranks));
    ++index;
  }
  return timeline;
}

}  // namespace dualpipe::planner
