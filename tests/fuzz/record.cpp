// Records of ranks from JSON: what is read can be reported on, alone and beside another rank.
#include "dualpipe/planner/record.hpp"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dualpipe/error.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {

void read(std::string_view text) {
  planner::Record record;
  try {
    record = planner::from_record(text);
  } catch (const InvalidArgument& error) {
    return require_readable(error.what());
  }
  std::vector<planner::Record> records{record};
  for (int count = 1; count <= 2; ++count) {
    const planner::StragglerReport report = planner::find_straggler(records, /*incomplete=*/true);
    require(report.ranks.size() == record.ranks.size(), "every rank is reported");
    require(std::none_of(report.verdict.begin(), report.verdict.end(),
                         [](char c) { return static_cast<unsigned char>(c) < 0x20; }),
            "a verdict is one line");
    if (record.ranks.size() == 1) return;
    // The same of the rank before it, a moment later.
    record.rank = record.ranks.front() == record.rank ? record.ranks.back() : record.ranks.front();
    record.unix_ns += record.unix_ns < (std::int64_t{1} << 62) ? 1000 : 0;
    records.push_back(record);
  }
}

}  // namespace dualpipe::fuzz
