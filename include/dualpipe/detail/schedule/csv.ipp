#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "dualpipe/detail/schedule/dependencies.hpp"
#include "dualpipe/detail/schedule/for_each_op.hpp"
#include "dualpipe/detail/schedule/quoted_op.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/schedule/schedule.hpp"

namespace dualpipe::detail {

inline std::string_view trimmed_cell(std::string_view cell) {
  constexpr std::string_view blank = " \t\r";
  const std::size_t begin = cell.find_first_not_of(blank);
  if (begin == std::string_view::npos) return {};
  return cell.substr(begin, cell.find_last_not_of(blank) - begin + 1);
}

// The first `length` characters of `rest`, which are taken off it together with the separator behind them.
inline std::string_view take_field(std::string_view& rest, std::size_t length) {
  const std::string_view field = rest.substr(0, length);
  rest.remove_prefix(std::min(rest.size(), field.size() + 1));
  return field;
}

// Takes the next cell off a row. A comma in quotes does not end it.
inline std::string_view take_cell(std::string_view& row) {
  bool quoted = false;
  const auto end = std::find_if(row.begin(), row.end(), [&](char c) {
    if (c == '"') quoted = !quoted;
    return c == ',' && !quoted;
  });
  return trimmed_cell(take_field(row, end - row.begin()));
}

// The content of a cell in quotes, where "" stands for a quote.
inline std::string unquoted_cell(std::string_view cell) {
  std::string content;
  for (std::string_view rest = cell.substr(1);;) {
    const std::size_t quote = rest.find('"');
    DUALPIPE_CHECK(quote != std::string_view::npos, quoted_op(cell), " has no closing quote in its row");
    content += take_field(rest, quote);
    if (rest.empty()) return content;
    DUALPIPE_CHECK(rest.front() == '"', quoted_op(cell), " goes on after its closing quote");
    content += '"';
    rest.remove_prefix(1);
  }
}

// An action that torch's lowering adds between the ops, as in 0SEND_F3 or 1UNSHARD. It follows from the ops, so it is
// skipped.
inline bool is_torch_action(std::string_view cell) {
  constexpr std::string_view digits = "0123456789";
  constexpr std::array<std::string_view, 7> actions = {"SEND_F",  "RECV_F",  "SEND_B",     "RECV_B",
                                                       "UNSHARD", "RESHARD", "REDUCE_GRAD"};
  const std::size_t begin = cell.find_first_not_of(digits);
  if (begin == 0 || begin == std::string_view::npos) return false;
  const std::string_view action = cell.substr(begin, cell.find_last_not_of(digits) - begin + 1);
  return std::find(actions.begin(), actions.end(), action) != actions.end();
}

struct CsvPlace {
  std::size_t row = 0;
  std::size_t cell = 0;

  std::string text() const { return str("row ", row, " (rank ", row - 1, "), cell ", cell, ": "); }
};

// The highest stage or micro-batch in a file, and where it is.
struct HighestNumber {
  int value = -1;
  CsvPlace place;

  void see(int number, const CsvPlace& at) {
    if (number > value) *this = {number, at};
  }
};

// Every stage and every micro-batch has ops of its own, so a number above the count of ops is a mistake. Refusing it
// keeps tables over stages and micro-batches as small as the file.
inline int count_of_highest(const HighestNumber& highest, std::int64_t ops, const char* what) {
  DUALPIPE_CHECK(highest.value < ops, highest.place.text(), what, " ", highest.value, " in a schedule of only ", ops,
                 ops == 1 ? " op" : " ops", "; they are numbered from 0 without gaps");
  return highest.value + 1;
}

// Checked before any row is read: each empty row takes many times the memory of its line end. Every op has one of these
// letters.
inline std::ptrdiff_t count_rows(std::string_view text) {
  const auto rows = std::count(text.begin(), text.end(), '\n') + 1;
  const auto letters =
      std::count_if(text.begin(), text.end(), [](char c) { return c == 'F' || c == 'I' || c == 'W' || c == 'B'; });
  constexpr std::ptrdiff_t idle_ranks = 4096;
  DUALPIPE_CHECK(rows <= letters + idle_ranks, "the text of a schedule has ", rows,
                 " rows, one for each rank, but not more than ", letters, letters == 1 ? " op" : " ops");
  return rows;
}

// Reads both notations of torch: B is the whole backward now, and was the input part before, which is I now; the whole
// was BW.
class CsvReader {
 public:
  explicit CsvReader(std::string_view text);

  Schedule read(std::string name) const;

 private:
  // Calls visit(place, step) for each cell that is neither empty nor an action of torch's lowering.
  template <class Visit>
  void for_each_step(const Visit& visit) const;
  Step parse(std::string_view cell) const;
  // Whether each B has its W in a file without I and BW, and is thus an input part. Refuses a file with both notations.
  bool b_is_input(std::vector<Op> weights) const;

  std::string_view text_;
  bool has_bw_;
};

inline CsvReader::CsvReader(std::string_view text) {
  constexpr std::string_view byte_order_mark = "\xef\xbb\xbf";
  if (text.starts_with(byte_order_mark)) text.remove_prefix(byte_order_mark.size());
  const std::size_t last = text.find_last_not_of("\r\n");
  text_ = text.substr(0, last == std::string_view::npos ? 0 : last + 1);
  has_bw_ = text_.find("BW") != std::string_view::npos;
}

template <class Visit>
inline void CsvReader::for_each_step(const Visit& visit) const {
  CsvPlace place;
  for (std::string_view rest = text_; !rest.empty();) {
    std::string_view row = take_field(rest, rest.find('\n'));
    ++place.row;
    for (place.cell = 1; !row.empty(); ++place.cell) {
      try {
        std::string unquoted;
        std::string_view cell = take_cell(row);
        if (cell.starts_with('"')) cell = trimmed_cell(unquoted = unquoted_cell(cell));
        if (cell.empty() || is_torch_action(cell)) continue;
        visit(place, parse(cell));
      } catch (const InvalidArgument& error) {
        throw InvalidArgument(place.text() + error.what());
      }
    }
  }
}

inline constexpr const char* older_notation =
    "; torch's older notation has B for the input part, each with its W, and BW for the whole backward; write I and B";

inline Step CsvReader::parse(std::string_view cell) const {
  if (!has_bw_) return parse_step(cell);
  std::string text(cell);
  const std::size_t whole = text.find("BW");
  if (whole != std::string::npos) text.erase(whole + 1, 1);
  Step step = parse_step(text);
  visit_ops(step, [&](Op& op) {
    DUALPIPE_CHECK(op.pass != Pass::BackwardInput, quoted_op(cell), " has an I where another cell has BW",
                   older_notation);
    if (op.pass == Pass::Backward && whole == std::string::npos) op.pass = Pass::BackwardInput;
  });
  return step;
}

inline bool CsvReader::b_is_input(std::vector<Op> weights) const {
  if (weights.empty() && !has_bw_) return false;
  std::sort(weights.begin(), weights.end());
  std::optional<bool> first;
  for_each_step([&](const CsvPlace&, const Step& step) {
    visit_ops(step, [&](const Op& op) {
      if (!is_backward(op.pass)) return;
      const Op weight{Pass::BackwardWeight, op.stage, op.micro_batch};
      const bool split = std::binary_search(weights.begin(), weights.end(), weight);
      if (!first) first = split;
      const bool expected = has_bw_ ? op.pass == Pass::BackwardInput : *first;
      DUALPIPE_CHECK(split == expected, "the backward has ", split ? "its " : "no ", to_string(weight),
                     ", unlike what other cells say", older_notation);
    });
  });
  return !has_bw_ && first.value_or(false);
}

inline Schedule CsvReader::read(std::string name) const {
  Schedule schedule;
  schedule.name = std::move(name);
  schedule.ranks.resize(count_rows(text_));
  HighestNumber stage, micro_batch;
  std::int64_t ops = 0;
  std::vector<Op> weights;
  bool inputs = false;
  for_each_step([&](const CsvPlace& place, const Step& step) {
    schedule.ranks[place.row - 1].push_back(step);
    visit_ops(step, [&](const Op& op) {
      ++ops;
      stage.see(op.stage, place);
      micro_batch.see(op.micro_batch, place);
      if (op.pass == Pass::BackwardWeight) weights.push_back(op);
      if (op.pass == Pass::BackwardInput) inputs = true;
    });
  });
  DUALPIPE_CHECK(ops > 0, "the text of schedule \"", schedule.name,
                 "\" has no ops; expected one row per rank, as in 0F0,0F1,0B0,0B1");
  schedule.num_stages = count_of_highest(stage, ops, "stage");
  schedule.num_micro_batches = count_of_highest(micro_batch, ops, "micro-batch");
  if ((has_bw_ || !inputs) && b_is_input(std::move(weights))) {
    for (auto& steps : schedule.ranks) {
      for_each_op(steps, [](Op& op) {
        if (op.pass == Pass::Backward) op.pass = Pass::BackwardInput;
      });
    }
  }
  return schedule;
}

}  // namespace dualpipe::detail

namespace dualpipe {

std::string to_csv(const Schedule& schedule) {
  std::string text;
  for (const auto& steps : schedule.ranks) {
    // A comma stands for two idle cells; an empty line at the end of the file would be skipped.
    if (steps.empty()) text += ',';
    for (std::size_t i = 0; i < steps.size(); ++i) {
      if (i > 0) text += ',';
      text += to_string(steps[i]);
    }
    text += '\n';
  }
  return text;
}

Schedule from_csv(std::string_view text, std::string name) { return detail::CsvReader(text).read(std::move(name)); }

}  // namespace dualpipe
