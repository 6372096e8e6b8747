#include "report.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <string_view>
#include <system_error>
#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/render.hpp"
#include "dualpipe/planner/report.hpp"

namespace example {

namespace planner = dualpipe::planner;
namespace {

namespace fs = std::filesystem;

/// Also where dualpipe-run stands between.
bool on_terminal() {
  const char* through_launcher = std::getenv("DUALPIPE_RUN_TERMINAL");
  if (through_launcher != nullptr && std::string_view(through_launcher) == "1") return true;
  const char* kind = std::getenv("TERM");
  return ::isatty(STDOUT_FILENO) && kind != nullptr && std::string_view(kind) != "dumb";
}

double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

}  // namespace

std::string format(const char* pattern, ...) {
  std::array<char, 256> line;
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(line.data(), line.size(), pattern, arguments);
  va_end(arguments);
  return line.data();
}

std::string picture(const dualpipe::Schedule& schedule, dualpipe::Publish publish) {
  const dualpipe::Timeline timeline = simulate(schedule, {}, publish).timeline;
  const planner::Report result = planner::report(timeline);
  std::string text = planner::to_ascii(timeline);
  if (!text.empty() && text.back() != '\n') text += '\n';
  const auto worst = std::max_element(result.ranks.begin(), result.ranks.end(),
                                      [](const auto& a, const auto& b) { return a.bubble < b.bubble; });
  return text + format("With F = 1, B = 2, W = 1 and a pair = 3: %g long, bubble %g on the worst rank (%.1f %%).\n",
                       result.makespan, worst->bubble, 100 * share(worst->bubble, result.makespan));
}

double bubble_share(const planner::Report& report) {
  double bubble = 0;
  for (const auto& rank : report.ranks) bubble += rank.bubble;
  return share(bubble, report.makespan * static_cast<double>(report.ranks.size()));
}

std::string comparison(const dualpipe::Timeline& predicted, const dualpipe::Timeline& measured,
                       const dualpipe::Costs& costs, int local_ranks, int cores) {
  const planner::Report left = planner::report(predicted), right = planner::report(measured);
  std::string text = format(
      "The last step, predicted from what its stages and pairs took (on average: F %.1f, B %.1f, W %.1f, pair %.1f, "
      "transfer %.2f "
      "ms), beside "
      "measured:\n",
      1e3 * costs.forward, 1e3 * costs.backward, 1e3 * costs.weight, 1e3 * costs.pair, 1e3 * costs.send);
  text += "        predicted                     measured\n";
  text += "  rank    busy  bubble  activations     busy  bubble  activations  communication  hidden under compute\n";
  for (std::size_t r = 0; r < right.ranks.size(); ++r) {
    const auto& a = left.ranks[r];
    const auto& b = right.ranks[r];
    text +=
        format("  %4d  %4.2f s  %4.1f %%  %11d   %4.2f s  %4.1f %%  %11d  %10.2f s    %17.1f %%\n", b.rank, a.busy,
               100 * share(a.bubble, left.makespan), a.peak_activations, b.busy, 100 * share(b.bubble, right.makespan),
               b.peak_activations, b.transfers.total(), 100 * share(b.transfers.hidden, b.transfers.total()));
  }
  text += format("  The step took %.2f s, predicted %.2f s (%+.1f %%); bubble %.1f %%, predicted %.1f %%.\n",
                 right.makespan, left.makespan, 100 * share(right.makespan - left.makespan, left.makespan),
                 100 * bubble_share(right), 100 * bubble_share(left));
  if (const planner::Overlap sums = right.total().reductions; sums.total() > 0)
    text += format("  Gradients were summed over the ranks in %.3f s on average, %.1f %% of it hidden under compute.\n",
                   sums.total() / static_cast<double>(right.ranks.size()), 100 * share(sums.hidden, sums.total()));
  if (local_ranks > cores)
    text += format(
        "  %d ranks share %d cores: measured times hold what other ranks computed meanwhile, so they show how the "
        "cores "
        "were\n  shared, not how long this pipeline takes where each rank has a core or a GPU of its own.\n",
        local_ranks, cores);
  return text;
}

std::string overlap(const dualpipe::Timeline& measured) {
  const planner::Report whole = planner::report(measured);
  if (whole.total().collectives.total() == 0) return "";
  const auto part = planner::main_part(measured);
  const planner::Report main = part ? planner::report(measured, *part) : planner::Report{};
  std::string text = "Where the time went, and how much of the communication inside stages was hidden under compute:\n";
  text += "  rank        compute        exposed         bubble   collectives   hidden   in the main part   hidden\n";
  const auto add = [&](const std::string& name, const planner::Usage& usage, const planner::Usage* in_main,
                       double time) {
    const auto part_of = [&](double seconds) {
      return format("%6.2f s %4.1f %%", seconds, 100 * share(seconds, time));
    };
    text += format("  %4s %s %s %s %11.2f s %6.1f %%", name.c_str(), part_of(usage.compute).c_str(),
                   part_of(usage.collectives.exposed).c_str(), part_of(usage.bubble).c_str(), usage.collectives.total(),
                   100 * share(usage.collectives.hidden, usage.collectives.total()));
    if (in_main != nullptr)
      text += format(" %16.2f s %6.1f %%", in_main->collectives.total(),
                     100 * share(in_main->collectives.hidden, in_main->collectives.total()));
    text += '\n';
  };
  for (std::size_t r = 0; r < whole.ranks.size(); ++r)
    add(std::to_string(whole.ranks[r].rank), whole.ranks[r], part ? &main.ranks[r] : nullptr, whole.makespan);
  const planner::Usage total = whole.total(), total_main = main.total();
  add("all", total, part ? &total_main : nullptr, whole.makespan * static_cast<double>(whole.ranks.size()));
  if (!part) text += "  (The ranks have no time in common in which all of them run pairs.)\n";
  return text;
}

std::string routing_table(const std::string& router, const Routing& first, const Routing& last) {
  const auto row = [&](const char* what, const std::vector<std::int64_t>& numbers, const char* pattern) {
    std::string text = format("  %-10s %-13s", router.c_str(), what);
    for (const std::int64_t each : numbers) text += format(pattern, static_cast<long long>(each));
    return text;
  };
  const auto tokens = [&](const char* what, const std::vector<std::int64_t>& counts) {
    const double sum = std::accumulate(counts.begin(), counts.end(), 0.0);
    const auto most = static_cast<double>(*std::max_element(counts.begin(), counts.end()));
    return row(what, counts, " %6lld") +
           format("   busiest %.2f\n", share(most * static_cast<double>(counts.size()), sum));
  };
  return tokens("first step", first.tokens) + tokens("last step", last.tokens) +
         row("bias raised", last.bias_steps, " %+6lld") + " times\n";
}

Progress::Progress(double seconds) : interval_(seconds), overwrites_(seconds > 0 && on_terminal()) {}

void Progress::show(std::string line) {
  pending_ = std::move(line);
  const auto now = Clock::now();
  if (overwrites_) {
    std::printf("\033[K%s\r", pending_.c_str());
    std::fflush(stdout);
  } else if (!shown_ || now - *shown_ >= interval_) {
    finish();
    shown_ = now;
  }
}

void Progress::finish() {
  if (pending_.empty()) return;
  std::printf("%s\n", pending_.c_str());
  std::fflush(stdout);
  pending_.clear();
}

std::string minutes(double seconds) {
  const long whole = std::lround(std::max(0.0, seconds));
  return format("%ld:%02ld", whole / 60, whole % 60);
}

void prepare_folder(const fs::path& path) {
  if (path.empty()) return;
  std::error_code error;
  DUALPIPE_CHECK(!fs::is_directory(path, error), "cannot write ", path, ": it is a folder");
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), error);
  DUALPIPE_CHECK(!path.has_parent_path() || fs::is_directory(path.parent_path()), "cannot make the folder ",
                 path.parent_path(), ": ", error.message());
}

}  // namespace example
