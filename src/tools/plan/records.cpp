#include "tools/plan/records.hpp"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>
#include <utility>

#include "dualpipe/detail/files.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/planner/record.hpp"
#include "tools/plan/print.hpp"

namespace dualpipe::planner::tool {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

bool is_record_name(const fs::path& path) {
  const std::string name = path.filename().string();
  return name.starts_with("rank-") && name.ends_with(".json") && name.size() > 10 &&
         name.find_first_not_of("0123456789", 5) == name.size() - 5;
}

std::string rank_seconds(double value) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(3) << value << " s";
  return std::move(out).str();
}

/// Columns of text, each as wide as its widest cell.
std::string text_columns(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& row : rows)
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string out;
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) out += row[i] + std::string(widths[i] - row[i].size() + 2, ' ');
    out.erase(out.find_last_not_of(' ') + 1);
    out += '\n';
  }
  return out;
}

std::string record_text(const Record& record, const StragglerReport& report) {
  std::vector<std::vector<std::string>> rows{{"rank", "step", "done last", "now", "for", "waits for"}};
  for (const RankProgress& rank : report.ranks) {
    if (!rank.recorded) {
      rows.push_back({detail::str(rank.rank), "", "no record", "", "", ""});
      continue;
    }
    std::string ranks;
    for (const int other : rank.waits_for) ranks += detail::str(ranks.empty() ? "rank " : ", ", other);
    if (ranks.empty() && rank.waits) ranks = "(its group)";
    rows.push_back({detail::str(rank.rank), detail::str(rank.step), rank.last,
                    rank.now.empty() ? "(own code)" : rank.now, rank_seconds(rank.seconds), ranks});
  }
  return detail::str(record.schedule, ": records of ", report.ranks.size(), " ranks, ", record.num_stages, " stages, ",
                     record.num_micro_batches, " micro-batches, as it was when the first was written\n",
                     text_columns(rows), report.verdict, "\n");
}

ordered_json record_json(const Record& record, const StragglerReport& report) {
  ordered_json ranks = ordered_json::array();
  for (const RankProgress& rank : report.ranks)
    ranks.push_back({{"rank", rank.rank},
                     {"recorded", rank.recorded},
                     {"step", rank.step},
                     {"last", rank.last},
                     {"now", rank.now},
                     {"seconds", rank.seconds},
                     {"waits_for", rank.waits_for}});
  return {{"schedule", record.schedule},
          {"ranks", std::move(ranks)},
          {"stragglers", report.stragglers},
          {"verdict", report.verdict}};
}

}  // namespace

std::vector<std::string> with_records_of_folders(const std::vector<std::string>& paths) {
  std::vector<std::string> files;
  for (const std::string& path : paths) {
    std::error_code error;
    if (!fs::is_directory(path, error)) {
      files.push_back(path);
      continue;
    }
    std::vector<std::string> records;
    for (fs::directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error))
      if (is_record_name(entry->path())) records.push_back(entry->path().string());
    DUALPIPE_CHECK(!error, "cannot read ", path, ": ", error.message());
    for (const std::string& record : records)
      DUALPIPE_CHECK(fs::is_regular_file(record, error), record, " is no regular file, so no record; remove it");
    DUALPIPE_CHECK(!records.empty(), "there is no record in ", path, ": no file rank-<number>.json");
    std::sort(records.begin(), records.end(), [](const std::string& a, const std::string& b) {
      return std::pair(a.size(), a) < std::pair(b.size(), b);
    });
    files.insert(files.end(), records.begin(), records.end());
  }
  return files;
}

bool is_record(const std::string& path) {
  return is_record_name(path) ||
         detail::read_file(path).substr(0, 100).find("\"dualpipe record\"") != std::string::npos;
}

std::string report_records(const std::vector<std::string>& paths, bool incomplete, bool as_json) {
  std::vector<Record> records;
  for (const std::string& path : paths) {
    const std::string text = detail::read_file(path);
    try {
      records.push_back(from_record(text));
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(path + ": " + error.what());
    }
  }
  const StragglerReport report = find_straggler(records, incomplete);
  return as_json ? dumped(record_json(records.front(), report)) : record_text(records.front(), report);
}

}  // namespace dualpipe::planner::tool
