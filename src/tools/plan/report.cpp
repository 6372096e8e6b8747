#include <CLI/CLI.hpp>
#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"
#include "dualpipe/planner/trace.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"
#include "tools/plan/records.hpp"
#include "tools/plan/view.hpp"

namespace dualpipe::planner::tool {
namespace {

using nlohmann::ordered_json;

struct ReportOptions {
  std::vector<std::string> files;  // traces, or records
  bool incomplete = false;
  ViewOptions view;
  OutputOptions output;
};

Timeline read_trace(const std::string& path) {
  const std::string text = detail::read_file(path);
  try {
    return from_trace(text);
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(path + ": " + error.what());
  }
}

/// What is reported of a trace: medians where it has several steps.
struct TraceReport {
  std::string name;
  double seconds_per_unit = 0;
  std::size_t num_steps = 0;
  Report whole = {};
  std::optional<Report> main = {};
  Window main_window = {};  // of the first step that has a main part, from its begin
};

TraceReport report_of(const Timeline& trace) {
  TraceReport result{.name = trace.name, .seconds_per_unit = trace.seconds_per_unit};
  std::vector<Report> wholes, mains;
  for (const Timeline& step : split_steps(trace)) {
    wholes.push_back(report(step));
    const std::optional<Window> part = main_part(step);
    if (!part) continue;
    if (mains.empty()) {
      const double begin = extent(step).begin;
      result.main_window = {part->begin - begin, part->end - begin};
    }
    mains.push_back(report(step, *part));
  }
  result.num_steps = wholes.size();
  result.whole = median(wholes);
  if (!mains.empty()) result.main = median(mains);
  return result;
}

ordered_json overlap_json(const Overlap& overlap) {
  return {{"total", overlap.total()}, {"hidden", overlap.hidden}, {"exposed", overlap.exposed}};
}

void add_usage(ordered_json& object, const Usage& usage) {
  object["busy"] = usage.busy;
  object["compute"] = usage.compute;
  object["bubble"] = usage.bubble;
  object["collectives"] = overlap_json(usage.collectives);
  object["transfers"] = overlap_json(usage.transfers);
  if (usage.reductions.total() > 0) object["reductions"] = overlap_json(usage.reductions);
}

void add_report(ordered_json& object, const Report& report) {
  object["makespan"] = report.makespan;
  ordered_json& ranks = object["ranks"] = ordered_json::array();
  for (const RankReport& rank : report.ranks) {
    ordered_json& entry = ranks.emplace_back(ordered_json{{"rank", rank.rank}});
    add_usage(entry, rank);
    entry["peak_activations"] = rank.peak_activations;
  }
  add_usage(object["total"] = ordered_json::object(), report.total());
}

ordered_json trace_json(const TraceReport& report) {
  ordered_json object{
      {"name", report.name}, {"seconds_per_unit", report.seconds_per_unit}, {"steps", report.num_steps}};
  add_report(object, report.whole);
  object["main"] = nullptr;
  if (report.main) {
    object["main"] = {{"begin", report.main_window.begin}, {"end", report.main_window.end}};
    add_report(object["main"], *report.main);
  }
  return object;
}

std::string text_of(const TraceReport& report) {
  const double unit = report.seconds_per_unit;
  std::string out = report.name + (report.name.empty() ? "" : ": ") + std::to_string(report.whole.ranks.size()) +
                    " ranks" +
                    (report.num_steps > 1 ? ", medians over " + std::to_string(report.num_steps) + " steps" : "") +
                    "\n" + text(report.whole, unit);
  if (report.main)
    out += "main part, where all ranks run pairs, from " + time(report.main_window.begin, unit) + " to " +
           time(report.main_window.end, unit) + ":\n" + text(*report.main, unit);
  return out;
}

std::string report_files(const ReportOptions& options) {
  const std::vector<std::string> files = with_records_of_folders(options.files);
  if (is_record(files.front())) {
    const std::string& format = options.output.format;
    DUALPIPE_CHECK(format != "svg" && format != "ascii", "a report of records is text or json, not ", format);
    return report_records(files, options.incomplete, format == "json");
  }
  DUALPIPE_CHECK(!options.incomplete, "--incomplete is for records, but ", files.front(), " is none");
  std::vector<Timeline> timelines;
  for (const std::string& path : files) timelines.push_back(read_trace(path));
  // Traces of one schedule have one name; their files tell them apart.
  std::map<std::string, int> uses;
  for (const Timeline& timeline : timelines) ++uses[timeline.name];
  for (std::size_t i = 0; i < timelines.size(); ++i)
    if (std::string& name = timelines[i].name; uses[name] > 1)
      name = std::filesystem::path(files[i]).stem().string() + (name.empty() ? "" : ", ") + name;
  const PictureOptions picture = picture_options(options.view, options.output, timelines.front());
  if (options.output.format == "svg") return to_svg(timelines, picture);
  std::string out;
  if (options.output.format == "ascii") {
    for (const Timeline& timeline : timelines) out += (out.empty() ? "" : "\n") + to_ascii(timeline, picture);
    return out;
  }
  ordered_json all = ordered_json::array();
  for (const Timeline& timeline : timelines) {
    const TraceReport result = report_of(timeline);
    if (options.output.format == "json")
      all.push_back(trace_json(result));
    else
      out += (out.empty() ? "" : "\n") + text_of(result);
  }
  return options.output.format != "json" ? out : dumped(all.size() == 1 ? all.front() : all);
}

}  // namespace

void add_report(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("report",
                                          "where the time of a recorded step went: compute, communication hidden and "
                                          "exposed, bubble; of a trace of several "
                                          "steps the medians. Of the records of a failed or hanging run: which rank "
                                          "was behind");
  auto options = std::make_shared<ReportOptions>();
  command
      .add_option("trace", options->files,
                  "traces (JSON), as simulate --format trace or a run writes them; several are drawn one below the "
                  "other. Or the "
                  "records of all ranks of a pipeline, or the folder that has them (DualPipeOptions::record_to)")
      ->required()
      ->option_text("FILE...");
  command.add_flag("--incomplete", options->incomplete,
                   "of records: ranks that have left none are taken as such that wait for nobody");
  add_output(command, options->output, {"text", "json", "ascii", "svg"});
  add_view(command, options->view);
  command.footer(
      "Compute: the steps of a rank; of a step whose stage communicates, only its nodes that compute. Exposed: a\n"
      "collective of a stage is under way and the rank does not compute. Bubble: the rest, so that the three make up "
      "the\n"
      "makespan. Collectives, transfers: time in which at least one is under way, and the share of it that is hidden,\n"
      "that is lies under compute of the same rank. Transfers are sends and receives between stages; where they are\n"
      "exposed, the rank waits in its bubble. Sums of gradients may also end behind the last computing. The main part "
      "is the time in which every rank is in its longest run of\n"
      "pairs: step 4 of DualPipe.\n"
      "JSON, times in the unit of the trace (seconds_per_unit of a second; 0: abstract):\n"
      "  {\"name\", \"seconds_per_unit\", \"steps\", \"makespan\",\n"
      "   \"ranks\": [{\"rank\", \"busy\" (within steps), \"compute\", \"bubble\",\n"
      "              \"collectives\": {\"total\", \"hidden\", \"exposed\"}, \"transfers\": {the same},\n"
      "              \"reductions\": {the same}, where there are sums of gradients,\n"
      "              \"peak_activations\"}, ...],\n"
      "   \"total\": {the same, summed over ranks},\n"
      "   \"main\": null or {\"begin\", \"end\", \"makespan\", \"ranks\", \"total\"}}; of several traces an array of "
      "these.\n"
      "Of records: {\"schedule\", \"ranks\": [{\"rank\", \"recorded\", \"step\", \"last\", \"now\", \"seconds\", "
      "\"waits_for\"},\n"
      "   ...], \"stragglers\": [ranks for which others wait and that wait for nobody], \"verdict\"}.");
  command.callback([options] { write_output(report_files(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
