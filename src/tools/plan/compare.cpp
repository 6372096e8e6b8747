#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/compare.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/costs.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

using nlohmann::ordered_json;

struct CompareOptions {
  ComparisonSpec spec{.kinds = {}, .ranks = {}, .micro_batches = {}};
  std::vector<std::string> schedules;  // kinds and files
  CostOptions costs;
  std::optional<double> memory_limit;
  OutputOptions output;
};

/// A CSV field.
std::string quoted(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string out = "\"";
  for (const char letter : text) out += letter == '"' ? "\"\"" : std::string(1, letter);
  return out + "\"";
}

/// All digits, so that a table read back has the very numbers.
std::string exact(double value) { return ordered_json(value).dump(); }

std::string csv(const Comparison& comparison) {
  std::string out =
      "schedule,ranks,micro_batches,per_micro_batch,makespan,efficiency,bubble,peak_activations,peak_memory,transfers,"
      "over_limit,refused\n";
  for (const ComparedSchedule& row : comparison.rows) {
    out += detail::str(quoted(row.name), ",", row.num_ranks, ",", row.num_micro_batches, ",");
    if (row.refused.empty())
      out += detail::str(exact(row.per_micro_batch), ",", exact(row.makespan), ",", exact(row.efficiency), ",",
                         exact(row.bubble), ",", row.peak_activations, ",", exact(row.peak_memory), ",",
                         row.num_transfers, ",", row.over_limit ? "yes" : "no", ",\n");
    else
      out += ",,,,,,,," + quoted(row.refused) + "\n";
  }
  return out;
}

std::string json(const Comparison& comparison, const CompareOptions& options) {
  ordered_json rows = ordered_json::array();
  for (const ComparedSchedule& row : comparison.rows) {
    ordered_json& entry = rows.emplace_back(
        ordered_json{{"schedule", row.name}, {"ranks", row.num_ranks}, {"micro_batches", row.num_micro_batches}});
    if (!row.refused.empty()) {
      entry["refused"] = row.refused;
      continue;
    }
    entry["per_micro_batch"] = row.per_micro_batch;
    entry["makespan"] = row.makespan;
    entry["efficiency"] = row.efficiency;
    entry["bubble"] = row.bubble;
    entry["peak_activations"] = row.peak_activations;
    entry["peak_memory"] = row.peak_memory;
    if (row.parameters > 0) entry["parameters"] = row.parameters;
    entry["transfers"] = row.num_transfers;
    entry["over_limit"] = row.over_limit;
  }
  ordered_json object{{"stages_described", comparison.described_stages}, {"memory_limit", nullptr}};
  if (options.memory_limit) object["memory_limit"] = *options.memory_limit;
  object["rows"] = std::move(rows);
  return dumped(object);
}

/// The fastest row within the limit for each number of micro-batches and of ranks.
std::string best(const Comparison& comparison, double unit) {
  std::map<int, std::map<int, const ComparedSchedule*>> by_ranks;
  for (const ComparedSchedule& row : comparison.rows)
    if (row.refused.empty() && !row.over_limit) by_ranks[row.num_ranks].try_emplace(row.num_micro_batches, &row);
  if (by_ranks.empty()) return "No schedule fits.\n";
  std::string out;
  for (const auto& [ranks, by_count] : by_ranks) {
    std::vector<const ComparedSchedule*> rows;
    for (const auto& [count, row] : by_count) rows.push_back(row);
    std::stable_sort(rows.begin(), rows.end(), [](const ComparedSchedule* a, const ComparedSchedule* b) {
      return a->per_micro_batch < b->per_micro_batch;
    });
    const ComparedSchedule& first = *rows.front();
    out += detail::str("On ", ranks, " ranks: ", first.num_micro_batches, " micro-batches with ", first.name, ", ",
                       time(first.per_micro_batch, unit), " each");
    for (std::size_t i = 1; i < rows.size(); ++i)
      out += detail::str(i == 1 ? "; then " : ", ", rows[i]->num_micro_batches, " (", rows[i]->name, ", ",
                         percent(rows[i]->per_micro_batch - first.per_micro_batch, first.per_micro_batch), " slower)");
    out += ".\n";
  }
  return out;
}

std::string text(const Comparison& comparison, const CompareOptions& options, const CostModel& model) {
  const Costs& costs = model.time;
  const double unit = costs.seconds_per_unit;
  std::string out =
      detail::str("Costs of one stage of ", comparison.described_stages, ": ", describe(costs, options.spec.publish),
                  ".\nAll rows train the same model with micro-batches of the same size.\n") +
      sharding_text(model.memory);
  std::vector<std::vector<std::string>> rows{{"schedule", "ranks", "micro-batches", "time/micro-batch", "makespan",
                                              "efficiency", "bubble", "", "activations", "memory", "transfers", ""}};
  if (!model.sizes.empty()) rows[0].insert(rows[0].end() - 1, "parameters");
  std::vector<const ComparedSchedule*> refused;
  for (const ComparedSchedule& row : comparison.rows) {
    if (!row.refused.empty()) {
      refused.push_back(&row);
      continue;
    }
    rows.push_back({row.name, std::to_string(row.num_ranks), std::to_string(row.num_micro_batches),
                    time(row.per_micro_batch, unit), time(row.makespan, unit), percent(row.efficiency, 1),
                    time(row.bubble, unit), percent(row.bubble, row.makespan), std::to_string(row.peak_activations),
                    detail::str(row.peak_memory), std::to_string(row.num_transfers),
                    row.over_limit ? "over the limit" : ""});
    if (!model.sizes.empty()) rows.back().insert(rows.back().end() - 1, amount(row.parameters));
  }
  if (rows.size() > 1) out += table(rows);
  if (!refused.empty()) out += "Not possible:\n";
  for (const ComparedSchedule* row : refused)
    out += detail::str("  ", row->name, ", ", row->num_ranks, " ranks, ", row->num_micro_batches,
                       " micro-batches: ", row->refused.substr(0, row->refused.find('\n')), "\n");
  return out + best(comparison, unit);
}

void show_progress(int done, int all) {
  if (::isatty(STDERR_FILENO) == 0) return;
  std::fprintf(stderr, done < all ? "\r%d of %d" : "\r\033[K", done, all);
  std::fflush(stderr);
}

std::string compare_and_print(const CompareOptions& options) {
  ComparisonSpec spec = options.spec;
  spec.kinds.clear();
  for (const std::string& name : options.schedules) {
    if (is_schedule_kind(name))
      spec.kinds.push_back(name);
    else
      spec.given.push_back(schedule({.kind = name}));
  }
  if (options.schedules.empty()) spec.kinds = schedule_kinds();
  if (!spec.kinds.empty() && (spec.ranks.empty() || spec.micro_batches.empty()))
    throw CLI::ValidationError("compare", "needs --ranks and --microbatches");
  if (options.memory_limit) {
    DUALPIPE_CHECK(std::isfinite(*options.memory_limit) && *options.memory_limit > 0,
                   "--memory-limit must be positive, got ", *options.memory_limit);
    spec.memory_limit = *options.memory_limit;
  }
  std::vector<int> ranks = spec.ranks;
  for (const Schedule& given : spec.given) ranks.push_back(static_cast<int>(given.ranks.size()));
  const auto [fewest, most] = std::minmax_element(ranks.begin(), ranks.end());
  if (spec.described_stages == 0) spec.described_stages = options.costs.listed_stages();
  if (spec.described_stages == 0) spec.described_stages = *fewest;
  spec.progress = show_progress;
  const CostModel model = options.costs.of(*most, spec.described_stages);
  const Comparison result = compare(spec, model);
  if (options.output.format == "csv") return csv(result);
  if (options.output.format == "json") return json(result, options);
  return text(result, options, model);
}

}  // namespace

void add_compare(CLI::App& app) {
  CLI::App& command = *app.add_subcommand(
      "compare",
      "which schedule, how many micro-batches: a table of kinds and sizes, the fastest per micro-batch first");
  auto options = std::make_shared<CompareOptions>();
  command
      .add_option("schedules,--schedule", options->schedules,
                  "kinds (" + kinds() + "; default: all) and CSV files, which have their own sizes")
      ->delimiter(',')
      ->option_text("KIND|FILE,...");
  command.add_option("--ranks", options->spec.ranks, "numbers of ranks")
      ->delimiter(',')
      ->check(CLI::PositiveNumber.description(""))
      ->option_text("P,P,...");
  command
      .add_option("--microbatches", options->spec.micro_batches,
                  "numbers of micro-batches per step, both directions together")
      ->delimiter(',')
      ->check(CLI::PositiveNumber.description(""))
      ->option_text("N,N,...");
  command.add_option("--chunks", options->spec.chunks_per_rank, "stages on each rank (interleaved)")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--stages", options->spec.described_stages,
                  "the costs are those of a model cut into this many stages; every row trains this model, cut into as "
                  "many as it has (default: as many as a costs file lists, or the smallest number of ranks)")
      ->check(CLI::PositiveNumber)
      ->option_text("K");
  add_costs(command, options->costs);
  add_memory(command, options->costs);
  add_recompute(command, options->costs);
  add_sharding(command, options->costs);
  command.add_option("--memory-limit", options->memory_limit, "mark what needs more memory on some rank")
      ->option_text("X");
  add_publish(command, options->spec.publish);
  add_output(command, options->output, {"text", "csv", "json"});
  command.callback([options] { write_output(compare_and_print(*options), options->output.path); });
}

}  // namespace dualpipe::planner::tool
