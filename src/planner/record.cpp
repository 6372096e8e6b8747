#include "dualpipe/planner/record.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <iomanip>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "planner/json.hpp"

namespace dualpipe::planner {
namespace {

using detail::brief;
using nlohmann::json;
using Operation = Record::Operation;

constexpr int record_version = 1;
constexpr std::array<const char*, 5> record_kinds{"compute", "send", "receive", "collective", "together"};

/// The members of one object of a record.
class RecordReader {
 public:
  RecordReader(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    DUALPIPE_CHECK(object.is_object(), where_, " must be an object, got ", brief(object));
  }

  bool has(const char* key) const { return object_.contains(key); }
  const json& operator[](const char* key) const {
    DUALPIPE_CHECK(has(key), where_, " lacks \"", key, "\"");
    return object_[key];
  }
  std::int64_t number(const char* key) const { return number((*this)[key], key); }
  std::int64_t number(const json& value, const char* key) const {
    // Above the largest signed one it would wrap.
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() ||
                       value.get<std::uint64_t>() <= std::uint64_t{std::numeric_limits<std::int64_t>::max()}) &&
                      value.get<std::int64_t>() >= 0;
    DUALPIPE_CHECK(fits, where_, ": \"", key, "\" must be a whole number from 0 on, got ", brief(value));
    return value.get<std::int64_t>();
  }
  int index(const json& value, const char* key) const {
    const std::int64_t all = number(value, key);
    DUALPIPE_CHECK(all <= 1'000'000'000, where_, ": \"", key, "\" is too large: ", all);
    return static_cast<int>(all);
  }
  int index(const char* key) const { return index((*this)[key], key); }
  std::string text(const char* key) const {
    const json& value = (*this)[key];
    DUALPIPE_CHECK(value.is_string(), where_, ": \"", key, "\" must be a string, got ", brief(value));
    return value.get<std::string>();
  }
  bool flag(const char* key) const {
    const json& value = (*this)[key];
    DUALPIPE_CHECK(value.is_boolean(), where_, ": \"", key, "\" must be true or false, got ", brief(value));
    return value.get<bool>();
  }
  const json& list(const char* key) const {
    const json& value = (*this)[key];
    DUALPIPE_CHECK(value.is_array(), where_, ": \"", key, "\" must be a list, got ", brief(value));
    return value;
  }

 private:
  const json& object_;
  std::string where_;
};

Operation read_operation(const json& object, std::size_t index) {
  const std::string where = detail::str("operation ", index);
  const RecordReader members(object, where);
  Operation operation;
  const std::string kind = members.text("do");
  const auto* const found = std::find(record_kinds.begin(), record_kinds.end(), kind);
  DUALPIPE_CHECK(found != record_kinds.end(), where, ": \"do\" is ", brief(members["do"]));
  operation.kind = static_cast<Record::Kind>(found - record_kinds.begin());
  if (operation.kind == Record::Kind::together) {
    operation.name = members.text("name");
    operation.number = members.number("number");
  } else {
    try {
      operation.step = parse_step(members.text("op"));
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(where + ": " + error.what());
    }
  }
  if (operation.kind == Record::Kind::send || operation.kind == Record::Kind::receive)
    operation.peer = members.index("peer");
  if (members.has("bytes")) operation.bytes = members.number("bytes");
  operation.in_step = members.number("step");
  operation.issued_ns = members.number("issued_ns");
  if (members.has("began_ns")) operation.began_ns = members.number("began_ns");
  if (members.has("ended_ns")) operation.ended_ns = members.number("ended_ns");
  return operation;
}

/// As a terminal may see it, of bounded length. Ranks write ASCII.
std::string shown(std::string text) {
  constexpr std::size_t longest = 400;
  if (text.size() > longest) text = text.substr(0, longest) + "...";
  for (char& c : text)
    if (c < ' ' || c > '~') c = '?';
  return text;
}

/// "rank 1", "ranks 1 and 2", "ranks 1, 2 and 3"
std::string listed(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i)
    text += detail::str(i == 0 ? "" : i + 1 < ranks.size() ? ", " : " and ", ranks[i]);
  return text;
}

std::string seconds_text(double seconds) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(3) << seconds << " s";
  return std::move(out).str();
}

/// What one rank did at one time of the clock that all share.
struct Moment {
  const Operation* last = nullptr;
  const Operation* now = nullptr;
  std::int64_t together = 0;  ///< the number of what it has come to last of what ranks do together
};

Moment moment_of(const Record& record, std::int64_t own_time) {
  Moment moment;
  for (const Operation& operation : record.operations) {
    if (operation.began_ns == 0 || operation.began_ns > own_time) continue;
    if (operation.kind == Record::Kind::together) moment.together = std::max(moment.together, operation.number);
    const bool ended = operation.ended_ns != 0 && operation.ended_ns <= own_time;
    const Operation*& known = ended ? moment.last : moment.now;
    const auto time = [ended](const Operation& of) { return ended ? of.ended_ns : of.began_ns; };
    if (known == nullptr || time(operation) >= time(*known)) known = &operation;
  }
  return moment;
}

void check_together(const std::vector<Record>& records, bool incomplete, std::map<int, const Record*>& by_rank) {
  DUALPIPE_CHECK(!records.empty(), "there is no record");
  const Record& first = records.front();
  for (const Record& record : records) {
    DUALPIPE_CHECK(record.run == first.run && record.ranks == first.ranks, "the records of ranks ", first.rank, " and ",
                   record.rank, " are of different runs; remove what is left of an earlier one");
    DUALPIPE_CHECK(by_rank.emplace(record.rank, &record).second, "there are two records of rank ", record.rank);
  }
  std::vector<int> missing;
  for (const int rank : first.ranks)
    if (!by_rank.contains(rank)) missing.push_back(rank);
  DUALPIPE_CHECK(missing.empty() || incomplete, "there is no record of ", listed(missing), " of ", first.ranks.size(),
                 " ranks; one that was killed, that failed outside of the pipeline, as in an optimizer, or whose own "
                 "code never returned leaves none: --incomplete goes on without");
}

/// Ranks that wait for each other, from one that can be reached from `start`; empty if there are none.
std::vector<int> cycle_from(int start, const std::map<int, const RankProgress*>& ranks) {
  std::vector<int> path{start};
  for (;;) {
    const RankProgress& at = *ranks.at(path.back());
    if (at.waits_for.empty()) return {};
    const int next = at.waits_for.front();
    if (const auto found = std::find(path.begin(), path.end(), next); found != path.end()) return {found, path.end()};
    path.push_back(next);
  }
}

std::string doing(const RankProgress& rank) {
  if (!rank.recorded)
    return "there is no record of it, as of a rank that was killed, failed outside of the pipeline or never returned";
  if (!rank.now.empty()) return "it was in " + rank.now + " for " + seconds_text(rank.seconds);
  return "it ran code outside of the pipeline for " + seconds_text(rank.seconds) +
         (rank.last.empty() ? "" : ", since " + rank.last);
}

/// The first line of what the rank threw.
std::string thrown_text(const Record& record) { return shown(record.failure.substr(0, record.failure.find('\n'))); }

/// Ranks that threw themselves, the first to leave its record first.
std::vector<const Record*> records_that_threw(const std::map<int, const Record*>& by_rank) {
  std::vector<const Record*> threw;
  for (const auto& [rank, record] : by_rank)
    if (record->threw) threw.push_back(record);
  std::stable_sort(threw.begin(), threw.end(),
                   [](const Record* a, const Record* b) { return a->unix_ns < b->unix_ns; });
  return threw;
}

/// Who waits for whom.
std::string waiting(const StragglerReport& report) {
  std::map<int, const RankProgress*> ranks;
  for (const RankProgress& rank : report.ranks) ranks[rank.rank] = &rank;
  if (report.stragglers.size() == 1) {
    const int rank = report.stragglers.front();
    return detail::str("Rank ", rank, " was behind: others wait for it, directly or not, and it waits for nobody; ",
                       doing(*ranks.at(rank)), ".");
  }
  if (report.stragglers.size() > 1) {
    std::string text =
        "R" + listed(report.stragglers).substr(1) + " were behind: others wait for them, and they for nobody";
    for (const int rank : report.stragglers) text += detail::str("; rank ", rank, ": ", doing(*ranks.at(rank)));
    return text + ".";
  }
  std::vector<int> unclear;
  for (const RankProgress& rank : report.ranks) {
    if (rank.waits && rank.waits_for.empty()) unclear.push_back(rank.rank);
    if (rank.waits_for.empty()) continue;
    const std::vector<int> cycle = cycle_from(rank.rank, ranks);
    if (cycle.empty()) continue;
    std::string text = "No rank was behind: " + listed(cycle) + " wait for each other";
    for (const int each : cycle) text += detail::str("; rank ", each, " in ", ranks.at(each)->now);
    return text + ".";
  }
  if (unclear.empty()) return "No rank waits for another.";
  return detail::str("Which rank was behind is not known: ", listed(unclear), unclear.size() == 1 ? " waits" : " wait",
                     " in what several ranks do together, and all that have "
                     "a record have come to it.");
}

std::string verdict(const StragglerReport& report, const std::map<int, const Record*>& by_rank) {
  const std::vector<const Record*> threw = records_that_threw(by_rank);
  if (threw.empty()) return waiting(report);
  const Record& first = *threw.front();
  std::vector<int> others;
  for (const Record* record : threw)
    if (record != &first) others.push_back(record->rank);
  std::sort(others.begin(), others.end());
  const std::string also = others.empty() ? "" : "; so did " + listed(others);
  if (others.empty() && report.stragglers == std::vector{first.rank})
    return waiting(report) + " It failed: " + thrown_text(first) + ".";
  return detail::str("Rank ", first.rank, " failed: ", thrown_text(first), also, ". ", waiting(report));
}

}  // namespace

Record from_record(std::string_view text) {
  const json root = detail::parse_json(text);
  DUALPIPE_CHECK(root.is_object() && root.contains("format") && root["format"] == "dualpipe record",
                 "not a record of a rank: expected an object with \"format\": \"dualpipe record\"");
  const RecordReader members(root, "the record");
  const std::int64_t version = members.number("version");
  DUALPIPE_CHECK(version == record_version, "the record has version ", version, ", this program reads version ",
                 record_version, "; use the dualpipe-plan of the library that wrote it");
  Record record;
  record.rank = members.index("rank");
  for (const json& rank : members.list("ranks")) record.ranks.push_back(members.index(rank, "ranks"));
  DUALPIPE_CHECK(std::count(record.ranks.begin(), record.ranks.end(), record.rank) == 1 &&
                     std::set<int>(record.ranks.begin(), record.ranks.end()).size() == record.ranks.size(),
                 "the record: \"ranks\" must name rank ", record.rank, ", and each rank once");
  record.run = members.number("run");
  record.schedule = shown(members.text("schedule"));
  record.num_stages = members.index("stages");
  record.num_micro_batches = members.index("micro_batches");
  record.step = members.number("step");
  record.failure = members.text("failure");
  record.threw = members.has("threw") && members.flag("threw");
  record.written_ns = members.number("written_ns");
  record.unix_ns = members.number("unix_ns");
  for (const json& operation : members.list("operations"))
    record.operations.push_back(read_operation(operation, record.operations.size()));
  return record;
}

std::string to_string(const Operation& operation) {
  if (operation.kind == Record::Kind::together) return shown(operation.name);
  const Step& step = operation.step;
  std::string op = to_string(step.op);
  if (step.overlapped) op += "&" + to_string(*step.overlapped);
  switch (operation.kind) {
    case Record::Kind::compute:
      return "compute " + op;
    case Record::Kind::collective:
      return "a collective of " + op;
    default:
      break;
  }
  const bool sends = operation.kind == Record::Kind::send;
  std::string text = detail::str(sends ? "send " : "receive ", op, sends ? " to rank " : " from rank ", operation.peer);
  if (operation.bytes >= 0) text += detail::str(", ", operation.bytes, " bytes");
  return text;
}

StragglerReport find_straggler(const std::vector<Record>& records, bool incomplete) {
  std::map<int, const Record*> by_rank;
  check_together(records, incomplete, by_rank);
  // What ranks did afterwards, when the others had given up, says nothing.
  std::int64_t time = std::numeric_limits<std::int64_t>::max();
  for (const Record& record : records) time = std::min(time, record.unix_ns);

  StragglerReport report;
  std::map<int, Moment> moments;
  std::vector<int> all = records.front().ranks;
  std::sort(all.begin(), all.end());
  for (const int rank : all) {
    const auto found = by_rank.find(rank);
    if (found == by_rank.end()) continue;
    const Record& record = *found->second;
    moments[rank] = moment_of(record, record.written_ns - (record.unix_ns - time));
  }
  for (const int rank : all) {
    RankProgress& progress = report.ranks.emplace_back();
    progress.rank = rank;
    progress.recorded = by_rank.contains(rank);
    if (!progress.recorded) continue;
    const Record& record = *by_rank.at(rank);
    const std::int64_t own_time = record.written_ns - (record.unix_ns - time);
    const Moment& moment = moments.at(rank);
    progress.step = record.step;
    if (moment.last != nullptr) {
      progress.step = moment.last->in_step;
      progress.last = to_string(*moment.last);
      progress.seconds = static_cast<double>(own_time - moment.last->ended_ns) * 1e-9;
    }
    if (moment.now == nullptr) continue;
    const Operation& now = *moment.now;
    progress.step = now.in_step;
    progress.now = to_string(now);
    progress.seconds = static_cast<double>(own_time - now.began_ns) * 1e-9;
    progress.waits = now.kind != Record::Kind::compute;
    if (now.peer >= 0 && std::binary_search(all.begin(), all.end(), now.peer)) progress.waits_for = {now.peer};
    if (now.kind != Record::Kind::together) continue;
    for (const int other : all)
      if (!by_rank.contains(other) || moments.at(other).together < now.number) progress.waits_for.push_back(other);
  }
  std::set<int> waited_for;
  for (const RankProgress& rank : report.ranks) waited_for.insert(rank.waits_for.begin(), rank.waits_for.end());
  for (const RankProgress& rank : report.ranks)
    if (!rank.waits && waited_for.contains(rank.rank)) report.stragglers.push_back(rank.rank);
  report.verdict = verdict(report, by_rank);
  return report;
}

}  // namespace dualpipe::planner
