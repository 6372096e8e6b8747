#include "tools/plan/print.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iomanip>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/planner/report.hpp"

namespace dualpipe::planner::tool {
namespace {

using nlohmann::ordered_json;
using Do = Instruction::Do;

const char* name_of(Do what) {
  switch (what) {
    case Do::receive:
      return "receive";
    case Do::wait:
      return "wait";
    case Do::compute:
      return "compute";
    case Do::send:
      return "send";
    case Do::reduce:
      return "reduce";
    case Do::release:
      break;
  }
  return "release";
}

}  // namespace

std::string dumped(const ordered_json& value) {
  return value.dump(-1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

std::string percent(double part, double whole) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(1) << (whole > 0 ? 100 * part / whole : 0.0) << " %";
  return std::move(out).str();
}

std::string amount(double value) {
  constexpr const char* units[] = {"", " k", " M", " G", " T", " P"};
  std::size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(units)) {
    value /= 1000;
    ++unit;
  }
  std::ostringstream out;
  out << std::setprecision(3) << value << units[unit];
  return std::move(out).str();
}

std::string text_of_stages(const Schedule& schedule, const CostModel& model) {
  const bool has_memory = !model.memory.stages.empty(), has_sizes = !model.sizes.empty();
  if (!has_memory && !has_sizes) return "";
  std::vector<std::vector<std::string>> rows{{"stage", "ranks"}};
  const auto add = [](std::vector<std::string>& row, const std::vector<std::string>& cells) {
    row.insert(row.end(), cells.begin(), cells.end());
  };
  if (has_sizes) add(rows[0], {"parameters", "bytes"});
  if (has_memory) add(rows[0], {"activation", "weight part", "state"});
  const std::vector<std::vector<int>> held = holders(schedule);
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    std::string ranks;
    for (const int rank : held[stage]) ranks += (ranks.empty() ? "" : ",") + std::to_string(rank);
    auto& row = rows.emplace_back(std::vector{std::to_string(stage), ranks});
    if (has_sizes) {
      const StageSize& size = model.sizes[stage];
      add(row, {amount(size.parameters), size.bytes > 0 ? amount(size.bytes) : ""});
    }
    if (has_memory) {
      const StageMemory& memory = model.memory.stages[stage];
      add(row, {amount(memory.activation), amount(memory.weight), amount(memory.state)});
    }
  }
  std::string out = table(rows);
  const std::vector<double> parameters = parameters_of_ranks(schedule, model.sizes);
  const auto most = std::max_element(parameters.begin(), parameters.end());
  if (most != parameters.end())
    out += detail::str("at most ", amount(*most), " parameters on a rank, rank ", most - parameters.begin(), "\n");
  return out;
}

ordered_json json_of_stages(const Schedule& schedule, const CostModel& model) {
  ordered_json list;
  if (model.memory.stages.empty() && model.sizes.empty()) return list;
  const std::vector<std::vector<int>> held = holders(schedule);
  for (int stage = 0; stage < schedule.num_stages; ++stage) {
    ordered_json& row = list.emplace_back(ordered_json{{"stage", stage}, {"ranks", held[stage]}});
    if (!model.sizes.empty()) {
      row["parameters"] = model.sizes[stage].parameters;
      row["bytes"] = model.sizes[stage].bytes;
    }
    if (!model.memory.stages.empty()) row["state"] = model.memory.stages[stage].state;
  }
  return list;
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i)
      out += std::string((i > 0 ? 2 : 0) + widths[i] - row[i].size(), ' ') + row[i];
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  }
  return out;
}

std::string time(double value, double seconds_per_unit) {
  if (seconds_per_unit == 0) return detail::str(std::abs(value) < 1e-9 ? 0.0 : value);
  const double seconds = value * seconds_per_unit;
  std::ostringstream out;
  out << std::fixed;
  seconds < 10 ? out << std::setprecision(2) << 1e3 * seconds << " ms" : out << std::setprecision(3) << seconds << " s";
  return std::move(out).str();
}

std::string describe(const Schedule& schedule) {
  return detail::str(schedule.name, ": ", schedule.ranks.size(), " ranks, ", schedule.num_stages, " stages, ",
                     schedule.num_micro_batches, " micro-batches");
}

std::string summary(const Report& report, double seconds_per_unit) {
  double bubble = 0;
  int peak = 0;
  for (const RankReport& rank : report.ranks) {
    bubble = std::max(bubble, rank.bubble);
    peak = std::max(peak, rank.peak_activations);
  }
  return detail::str("makespan ", time(report.makespan, seconds_per_unit), ", bubble ", time(bubble, seconds_per_unit),
                     " (", percent(bubble, report.makespan), ") on the worst rank, at most ", peak,
                     " activations held on a rank\n");
}

std::string json(const Schedule& schedule) {
  ordered_json ranks = ordered_json::array();
  for (const auto& steps : schedule.ranks) {
    ordered_json& rank = ranks.emplace_back(ordered_json::array());
    for (const Step& step : steps) rank.push_back(to_string(step));
  }
  return dumped({{"name", schedule.name},
                 {"num_stages", schedule.num_stages},
                 {"num_micro_batches", schedule.num_micro_batches},
                 {"ranks", std::move(ranks)}});
}

std::string json(const Program& program) {
  // Written directly: programs have millions of instructions, and nothing in them needs quoting.
  std::string out = "{\"order\":[";
  const char* separator = "";
  for (const Transfer& transfer : program.order) {
    out +=
        detail::str(separator, "\n{\"payload\":\"", transfer.payload == Payload::activation ? "activation" : "gradient",
                    "\",\"stage\":", transfer.stage, ",\"micro_batch\":", transfer.micro_batch,
                    ",\"from\":", transfer.from, ",\"to\":", transfer.to, "}");
    separator = ",";
  }
  if (!program.reductions.empty()) {
    out += "],\n\"reductions\":[";
    separator = "";
    for (const auto& [stage, ranks, behind] : program.reductions) {
      std::string list;
      for (const int rank : ranks) list += (list.empty() ? "" : ",") + std::to_string(rank);
      out += detail::str(separator, "\n{\"stage\":", stage, ",\"ranks\":[", list, "],\"behind\":", behind, "}");
      separator = ",";
    }
  }
  out += "],\n\"ranks\":[";
  separator = "";
  for (const auto& instructions : program.ranks) {
    out += detail::str(separator, "\n[");
    separator = "";
    for (const Instruction& instruction : instructions) {
      out += detail::str(separator, "{\"do\":\"", name_of(instruction.what), "\",");
      if (instruction.what == Do::compute)
        out += "\"step\":\"" + to_string(instruction.step) + "\"}";
      else
        out +=
            detail::str(instruction.what == Do::reduce ? "\"reduction\":" : "\"transfer\":", instruction.transfer, "}");
      separator = ",";
    }
    out += "]";
    separator = ",";
  }
  return out + "]}\n";
}

std::string text(const Program& program) {
  std::string out = "order of transfers:\n";
  for (std::size_t i = 0; i < program.order.size(); ++i) {
    const Transfer& transfer = program.order[i];
    out += detail::str("  ", i, ": ", to_string(transfer),
                       transfer.payload == Payload::activation ? ", activation\n" : ", gradient\n");
  }
  if (!program.reductions.empty()) out += "sums of gradients:\n";
  for (std::size_t i = 0; i < program.reductions.size(); ++i) {
    const auto& [stage, ranks, behind] = program.reductions[i];
    std::string list;
    for (const int rank : ranks) list += (list.empty() ? "" : ", ") + std::to_string(rank);
    out += detail::str("  ", i, ": stage ", stage, " on rank", ranks.size() > 1 ? "s " : " ", list, ", behind ", behind,
                       " transfers\n");
  }
  for (std::size_t rank = 0; rank < program.ranks.size(); ++rank) {
    out += detail::str("rank ", rank, ":\n");
    for (const Instruction& instruction : program.ranks[rank]) {
      if (instruction.what == Do::compute)
        out += detail::str("  compute ", to_string(instruction.step), "\n");
      else if (instruction.what == Do::reduce)
        out += detail::str("  reduce ", instruction.transfer, "  (stage ",
                           program.reductions[instruction.transfer].stage, ")\n");
      else
        out += detail::str("  ", name_of(instruction.what), " ", instruction.transfer, "  (",
                           to_string(program.order[instruction.transfer]), ")\n");
    }
  }
  return out;
}

ordered_json json_of(const Report& report) {
  ordered_json ranks = ordered_json::array();
  for (const RankReport& rank : report.ranks)
    ranks.push_back({{"rank", rank.rank},
                     {"busy", rank.busy},
                     {"bubble", rank.bubble},
                     {"peak_activations", rank.peak_activations}});
  return {{"makespan", report.makespan}, {"ranks", std::move(ranks)}};
}

std::string text(const Report& report, double seconds_per_unit) {
  const Usage total = report.total();
  const bool collectives = total.collectives.total() > 0, transfers = total.transfers.total() > 0,
             reductions = total.reductions.total() > 0;
  const auto shown = [&](double value) { return time(value, seconds_per_unit); };
  std::vector<std::vector<std::string>> rows{{"rank", "compute", ""}};
  const auto add = [](std::vector<std::string>& row, const std::vector<std::string>& cells) {
    row.insert(row.end(), cells.begin(), cells.end());
  };
  if (collectives) add(rows[0], {"exposed", ""});
  add(rows[0], {"bubble", ""});
  if (collectives) add(rows[0], {"collectives", "hidden"});
  if (transfers) add(rows[0], {"transfers", "hidden"});
  if (reductions) add(rows[0], {"sums of gradients", "hidden"});
  add(rows[0], {"peak activations"});
  const auto row = [&](const std::string& name, const Usage& usage, double whole, const std::string& peak) {
    auto& cells =
        rows.emplace_back(std::vector<std::string>{name, shown(usage.compute), percent(usage.compute, whole)});
    if (collectives) add(cells, {shown(usage.collectives.exposed), percent(usage.collectives.exposed, whole)});
    add(cells, {shown(usage.bubble), percent(usage.bubble, whole)});
    for (const auto& [any, overlap] : {std::pair(collectives, usage.collectives), std::pair(transfers, usage.transfers),
                                       std::pair(reductions, usage.reductions)})
      if (any) add(cells, {shown(overlap.total()), percent(overlap.hidden, overlap.total())});
    cells.push_back(peak);
  };
  for (const RankReport& rank : report.ranks)
    row(std::to_string(rank.rank), rank, report.makespan, std::to_string(rank.peak_activations));
  if (report.ranks.size() > 1) row("all", total, report.makespan * static_cast<double>(report.ranks.size()), "");
  return table(rows) + summary(report, seconds_per_unit);
}

}  // namespace dualpipe::planner::tool
