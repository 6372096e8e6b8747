#include "dualpipe/planner/search.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dualpipe/error.hpp"
#include "tools/plan/commands.hpp"
#include "tools/plan/costs.hpp"
#include "tools/plan/files.hpp"
#include "tools/plan/options.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

using nlohmann::ordered_json;

struct SearchFlags {
  ScheduleSpec schedule;
  CostOptions costs;
  int described_stages = 0;
  SearchOptions search;
  OutputOptions report;
  std::string output;  // of the schedule
};

constexpr int unlimited = std::numeric_limits<int>::max();

/// CLI11's own spells out the largest double.
CLI::Validator positive() {
  return {[](std::string& text) {
            double value = 0;
            const bool fits = CLI::detail::lexical_cast(text, value) && value > 0 && std::isfinite(value);
            return fits ? std::string() : "must be a positive number, got " + text;
          },
          ""};
}

/// Before a search of minutes, not after it.
void check_writable(const std::string& path) {
  if (path.empty()) return;
  const std::filesystem::path folder = std::filesystem::path(path).parent_path();
  const std::string where = folder.empty() ? "." : folder.string();
  DUALPIPE_CHECK(::access(where.c_str(), W_OK) == 0, "cannot write ", path, ": ", std::strerror(errno));
}

void show_progress(const SearchProgress& progress) {
  std::fprintf(stderr, "\r%.1f s, %lld of %lld orders, makespan %g, bound %g\033[K", progress.seconds,
               static_cast<long long>(progress.evaluations), static_cast<long long>(progress.budget), progress.best,
               progress.bound);
  std::fflush(stderr);
}

/// The fastest published order that fits the limits; null: none does.
const SearchStart* best_published(const SearchResult& result) {
  const SearchStart* best = nullptr;
  for (const SearchStart& start : result.starts)
    if (start.published && start.fits && (best == nullptr || start.makespan < best->makespan)) best = &start;
  return best;
}

std::string reason_of(const LowerBound& bound, double unit) {
  if (bound.rank < 0) return "one micro-batch alone takes as long";
  std::string text = detail::str("rank ", bound.rank, ": ", time(bound.busy, unit));
  text += bound.by_memory ? " for which it has to hold its activations within the limit" : " of work";
  if (bound.head > 0) text += ", " + time(bound.head, unit) + " before its first input can arrive";
  if (bound.tail > 0) text += ", " + time(bound.tail, unit) + " of others after its last result";
  return text;
}

std::string above(double makespan, const LowerBound& bound) {
  return percent(std::max(0.0, makespan - bound.makespan), bound.makespan);
}

std::string search_text(const SearchResult& result, const SearchFlags& options, const Costs& costs) {
  const double unit = costs.seconds_per_unit;
  const SearchLimits& limits = result.limits;
  std::string most;
  const auto add = [&](const std::string& what) { most += (most.empty() ? "" : ", ") + what; };
  if (limits.activations != unlimited) add(detail::str(limits.activations, " activations"));
  if (limits.weights != unlimited) add(detail::str(limits.weights, " waiting weight parts"));
  if (std::isfinite(limits.memory)) add(detail::str(limits.memory, " of memory"));
  std::string out = describe(result.schedule) + "; " + describe(costs, options.search.publish) +
                    "\nOn each rank at most " + most + ".\n";
  std::vector<std::vector<std::string>> rows{{"order", "makespan", "above the bound"}};
  for (const SearchStart& start : result.starts) {
    rows.push_back({start.name, time(start.makespan, unit), above(start.makespan, result.bound)});
    if (!start.fits) rows.back().emplace_back("over the limit");
  }
  rows.push_back({"found", time(result.makespan, unit), above(result.makespan, result.bound)});
  rows.push_back({"lower bound", time(result.bound.makespan, unit)});
  out += table(rows) + "The bound is that of " + reason_of(result.bound, unit) + ".\n";
  constexpr double rounding = 1e-9;
  const SearchStart* published = best_published(result);
  if (published != nullptr && published->makespan <= result.bound.makespan * (1 + rounding))
    out += published->name + " reaches it: no order with this placement is faster.\n";
  else if (published != nullptr)
    out += percent(published->makespan - result.makespan, published->makespan - result.bound.makespan) +
           " of the distance between " + published->name + " and the bound removed.\n";
  return out + detail::str(result.evaluations, " orders in ", std::round(result.seconds * 100) / 100, " s, seed ",
                           options.search.seed, ".\n");
}

std::string search_json(const SearchResult& result, const SearchFlags& options) {
  ordered_json starts = ordered_json::array();
  for (const SearchStart& start : result.starts)
    starts.push_back({{"order", start.name}, {"makespan", start.makespan}, {"fits", start.fits}});
  ordered_json object{{"makespan", result.makespan},
                      {"bound",
                       {{"makespan", result.bound.makespan},
                        {"rank", result.bound.rank},
                        {"head", result.bound.head},
                        {"busy", result.bound.busy},
                        {"tail", result.bound.tail},
                        {"by_memory", result.bound.by_memory}}},
                      {"starts", std::move(starts)},
                      {"evaluations", result.evaluations},
                      {"seconds", result.seconds},
                      {"seed", options.search.seed}};
  ordered_json& limits = object["limits"] = {{"activations", nullptr}, {"weights", nullptr}, {"memory", nullptr}};
  if (result.limits.activations != unlimited) limits["activations"] = result.limits.activations;
  if (result.limits.weights != unlimited) limits["weights"] = result.limits.weights;
  if (std::isfinite(result.limits.memory)) limits["memory"] = result.limits.memory;
  return dumped(object);
}

CostModel model_for(const SearchFlags& options, int num_ranks, int stages) {
  int described = options.described_stages != 0 ? options.described_stages : options.costs.listed_stages();
  if (described == 0) described = stages;
  const CostModel model = options.costs.of(num_ranks, described);
  return described == stages ? model : spread(model, described, stages);
}

void search_and_print(const SearchFlags& options) {
  check_writable(options.output);
  SearchOptions search_options = options.search;
  const bool terminal = ::isatty(STDERR_FILENO) == 1;
  if (terminal)
    search_options.progress = [](const SearchProgress& progress) {
      show_progress(progress);
      return true;
    };
  SearchResult result;
  CostModel model;
  if (is_schedule_kind(options.schedule.kind)) {
    if (options.schedule.num_ranks == 0 || options.schedule.num_micro_batches == 0)
      throw CLI::ValidationError("--schedule " + options.schedule.kind, "needs --ranks and --microbatches");
    model = model_for(options, options.schedule.num_ranks, num_stages(options.schedule));
    result = search(options.schedule, model, search_options);
  } else {
    const Schedule start = schedule(options.schedule);
    model = model_for(options, static_cast<int>(start.ranks.size()), start.num_stages);
    result = search(start, model, search_options);
  }
  if (terminal) std::fprintf(stderr, "\r\033[K");
  if (!options.output.empty()) write_output(to_csv(result.schedule), options.output);
  if (options.report.format == "csv")
    write_output(to_csv(result.schedule), "");
  else
    write_output(
        options.report.format == "json" ? search_json(result, options) : search_text(result, options, model.time), "");
}

}  // namespace

void add_search(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("search",
                                          "look for a faster order of the same work for costs of your own, within the "
                                          "memory of the published one; says how "
                                          "far from the lower bound it is");
  auto options = std::make_shared<SearchFlags>();
  add_schedule(command, options->schedule);
  add_costs(command, options->costs);
  command
      .add_option("--stages", options->described_stages,
                  "the costs are those of a model cut into this many stages (default: as many as the schedule has)")
      ->check(positive())
      ->option_text("K");
  add_memory(command, options->costs);
  add_publish(command, options->search.publish);
  SearchLimits& limits = options->search.limits;
  command
      .add_option("--max-activations", limits.activations,
                  "activations held on a rank at once (default: as many as the kind's own order holds)")
      ->check(positive())
      ->option_text("N");
  command
      .add_option("--max-weights", limits.weights,
                  "weight parts that wait on a rank at once (default: as many as in the kind's own order)")
      ->check(CLI::NonNegativeNumber.description(""))
      ->option_text("N");
  command
      .add_option_function<double>(
          "--memory-limit",
          [&limits](double limit) {
            DUALPIPE_CHECK(std::isfinite(limit) && limit > 0, "--memory-limit must be positive, got ", limit);
            limits.memory = limit;
            // A memory limit alone replaces the default limits on numbers.
            if (limits.activations == 0) limits.activations = unlimited;
            if (limits.weights < 0) limits.weights = unlimited;
          },
          "memory of a rank, in the unit of the memory costs, instead of the two numbers above")
      ->option_text("X");
  command.add_option("--evaluations", options->search.evaluations, "orders to look at (default: some seconds' worth)")
      ->check(positive())
      ->option_text("N");
  command
      .add_option("--seconds", options->search.seconds,
                  "end after this long; without --evaluations the search makes use of all of it")
      ->check(positive())
      ->option_text("S");
  command.add_option("--seed", options->search.seed, "the same seed and --evaluations find the same order")
      ->capture_default_str();
  command.add_option("--output", options->output, "write the schedule found to this file, for --schedule")
      ->option_text("FILE.csv");
  command.add_option("--format", options->report.format, "what to print (default: text)")
      ->check(CLI::IsMember({"text", "json", "csv"}).description(""))
      ->option_text("text|json|csv");
  command.callback([options] { search_and_print(*options); });
}

}  // namespace dualpipe::planner::tool
