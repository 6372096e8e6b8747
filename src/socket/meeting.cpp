#include "socket/meeting.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "contact/host.hpp"
#include "contact/secrets.hpp"
#include "contact/stand_in.hpp"
#include "dualpipe/error.hpp"
#include "launch/failed_file.hpp"
#include "launch/met_file.hpp"
#include "socket/meeting_place.hpp"

namespace dualpipe::detail {
namespace {

using namespace std::chrono_literals;

/// After this time a warning says why nothing happens.
constexpr std::chrono::milliseconds silence_limit = 10s;
/// How long a rank that leaves waits for the others to know why, or to leave as well.
constexpr std::chrono::milliseconds give_up_limit = 1s, leave_limit = 2s;
/// How long rank 0 tells those who come why it has given up, at most: they would look for it until their deadline.
constexpr std::chrono::milliseconds stay_limit = 1500ms;
constexpr std::chrono::milliseconds shortest_period = 5ms, longest_period = 500ms;
/// Between two tries to listen at an address that is taken.
constexpr std::chrono::milliseconds pause_between_tries = 50ms;

std::chrono::milliseconds period_of(const ConnectOptions& options) {
  auto period = std::min<std::chrono::milliseconds>(longest_period, options.timeout / 20);
  if (options.liveness > 0ms) period = std::min<std::chrono::milliseconds>(period, options.liveness / 5);
  return std::max(period, shortest_period);
}

/// "1, 2, 5"
std::string list(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += str(text.empty() ? "" : ", ", rank);
  return text;
}

/// What comes from others may be anything.
std::int64_t integer_in(const nlohmann::json& json) {
  if (!json.is_number_integer()) throw std::runtime_error("no integer: " + json.dump());
  return json.get<std::int64_t>();
}

Introduction introduction_of(const World& world, const ConnectOptions& options, Route route, Encryption* encryption) {
  Introduction introduction{.own = {}, .key = world.secret, .encryption = encryption, .check = {}};
  introduction.own.rank = world.rank;
  introduction.own.size = world.size;
  introduction.own.meeting =
      authentication_code(world.secret, {"meeting", world.run_id, options.name, std::to_string(options.epoch)});
  introduction.check = [&world, route, meeting = introduction.own.meeting](const Greeting& theirs,
                                                                           const Ends& ends) -> std::string {
    if (theirs.meeting != meeting && theirs.meeting != meeting_of_launchers(world)) return another_meeting;
    if (world.rank != 0 && theirs.rank != 0) return str("rank ", theirs.rank, " answers");
    return ends.are_far() && route == Route::best && !may_use_tcp(world, ends.other) ? not_by_tcp : "";
  };
  return introduction;
}

}  // namespace

// ---- what rank 0 and the others have in common

Meeting::Meeting(asio::io_context& io, const World& world, const ConnectOptions& options)
    : io_(io),
      world_(world),
      options_(options),
      met_file_(met_file(world)),
      period_(period_of(options)),
      failed_file_(failed_file(world)),
      timer_(io) {
  note_meeting(met_file_);
  timer_.expires_after(period_);
  beat_regularly();
}

void Meeting::beat_regularly() {
  timer_.async_wait([this](const asio::error_code& error) {
    if (error) return;
    const auto now = Clock::now();
    was_stopped_ = now - timer_.expiry() > period_;
    pulse();
    look_for_dead();
    timer_.expires_at(now + period_);
    beat_regularly();
  });
}

void Meeting::look_for_dead() {
  const auto report = failure_in(failed_file_);
  if (!report || !is_rank(report->rank) || report->rank == world_.rank) return;
  dead_ = report->rank;
  fail(is_rank(report->origin) ? report->origin : report->rank, absence_of(*report));
}

std::vector<std::string> Meeting::all_gather(const std::string& mine, const std::string& lacks) {
  result_.reset();
  status_.lacks = lacks;
  say(mine);
  wait_until([this] { return result_.has_value(); }, [this] { return waits_for(); }, [this] { return late(); });
  return *std::exchange(result_, std::nullopt);
}

void Meeting::wait_until(const std::function<bool()>& condition, const std::function<std::string()>& what,
                         const std::function<CommError()>& late, std::chrono::milliseconds look_every) {
  io_.restart();
  while (!condition()) {
    if (failure_) throw *failure_;
    const auto left = options_.timeout - watch_.elapsed();  // looked at in every period
    if (left <= 0s) throw late();
    const auto left_at_warning = options_.timeout - std::min(silence_limit, options_.timeout / 4);
    if (!warned_ && left <= left_at_warning) {
      warned_ = true;
      TORCH_WARN("rank ", world_.rank, " waits for ", what(), ", and gives up in ",
                 std::chrono::duration_cast<std::chrono::seconds>(left).count(), " s");
    }
    io_.run_one_for(std::min<Clock::duration>(look_every, warned_ ? left : left - left_at_warning));
  }
}

void Meeting::drain(std::chrono::milliseconds patience, const std::function<bool()>& condition) noexcept {
  try {
    const auto limit = Clock::now() + patience;
    io_.restart();
    while (!condition() && io_.run_one_until(limit) > 0) {
    }
  } catch (...) {
    // Others find the connection closed.
  }
}

void Meeting::fail(int origin, const std::string& reason) {
  if (!failure_) failure_.emplace(origin, "rendezvous", reason);
}

void Meeting::fail_by_end(int rank, const std::string& why) {
  fail(rank, str("rank ", world_.rank, ": rank ", rank,
                 why.empty() ? " closed its connection while the ranks were meeting (killed?)"
                             : " cannot be reached any more while the ranks were meeting: " + why));
}

Line::Frame Meeting::failure_frame(const CommError& error) const {
  nlohmann::json failed = {{"origin", error.origin_rank()}, {"reason", error.what()}};
  if (dead_) failed["dead"] = *dead_;
  return Line::frame_of({{"failed", failed}});
}

void Meeting::fail_as_told(const nlohmann::json& failed) {
  const std::int64_t origin = integer_in(failed.at("origin"));
  const std::int64_t dead = failed.contains("dead") ? integer_in(failed.at("dead")) : -1;
  if (is_rank(dead)) dead_ = static_cast<int>(dead);
  // Ranks of a larger world than this one's are unknown here.
  fail(is_rank(origin) ? static_cast<int>(origin) : -1, failed.at("reason").get<std::string>());
}

std::string Meeting::waits_for(const Status& status) const {
  std::string text = "rank 0 to go on";
  if (!status.missing.empty())
    text = str("rank ", list(status.missing), status.lacks.empty() ? " to start" : ", which " + status.lacks);
  return str(text, " (communicator '", options_.name, "', epoch ", options_.epoch, ")");
}

std::string Meeting::silence_of(int rank) const {
  return str("rank ", world_.rank, ": rank ", rank, " has given no sign of life for ", options_.liveness.count(),
             " ms while the ranks were meeting (stopped, or its host or the network failed?)");
}

CommError Meeting::late(const Status& status) const {
  const std::string place =
      str("communicator '", options_.name, "', epoch ", options_.epoch, ", ", world_.size, " ranks");
  std::string text = str("rank ", world_.rank, ": ");
  if (status.missing.empty()) {
    text += str("rank 0 does not go on within ", options_.timeout.count(), " ms (", place, ")");
  } else if (status.lacks.empty()) {
    text += str("no sign of rank ", list(status.missing), " within ", options_.timeout.count(), " ms (", place,
                "): have all started, with the same WORLD_SIZE, name and epoch?");
  } else {
    text += str("rank ", list(status.missing), " ", status.lacks, ", after ", options_.timeout.count(), " ms (", place,
                ")");
  }
  return {status.missing.empty() ? 0 : status.missing.front(), "rendezvous", text};
}

namespace {

// ---- rank 0

class MeetingHost final : public Meeting {
 public:
  MeetingHost(asio::io_context& io, const World& world, const ConnectOptions& options, Route route,
              Encryption* encryption)
      : Meeting(io, world, options),
        session_(random_bytes()),
        said_(world.size),
        lines_(world.size),
        place_(world, options, watch_, route),
        listener_(io, introduction_of(world, options, route, encryption), world.size,
                  [this](Contact contact) { admit(std::move(contact)); }) {}
  ~MeetingHost() override {
    listener_.close();
    for (const auto& line : all_) line->close();
  }

  void join() override {
    place_.open(listener_, [this](const std::string& place, const auto& free) { wait_for_place(place, free); });
  }

  void leave() override {
    leaving_ = true;
    // Afterwards the connections are expected to beat, and meanwhile they do not.
    drain(looks_for_silence() ? std::min<std::chrono::milliseconds>(leave_limit, options_.liveness / 2) : leave_limit,
          [this] { return all_closed(); });
  }

  void give_up(const CommError& error) noexcept override {
    try {
      leaving_ = true;
      farewell_ = failure_frame(error);
      for (const auto& line : all_) line->send(farewell_);
    } catch (...) {
      // They find their connections closed.
    }
    const auto told_until = Clock::now() + give_up_limit;
    drain(std::min(stay_limit, std::max(give_up_limit, options_.timeout)), [this, told_until] {
      return (all_closed() || Clock::now() >= told_until) && (!listener_.is_open() || have_all_come());
    });
  }

  std::string session_key() const override { return session_key_of(world_, hexadecimal(session_)); }

  static std::string session_key_of(const World& world, const std::string& session) {
    return std::string(as_text(authentication_code(world.secret, {"session", session})));
  }

 private:
  void wait_for_place(const std::string& place, const std::function<bool()>& free) {
    if (free()) return;
    taken_place_ = place;
    const auto late = [&] {
      return CommError(0, "rendezvous",
                       str("rank 0: cannot listen at ", place, ", which was taken for ", options_.timeout.count(),
                           " ms: does another job use the same MASTER_PORT? Choose another one"));
    };
    wait_until(free, [&] { return place + ", which is taken"; }, late, pause_between_tries);
    taken_place_.clear();
  }

  void admit(Contact contact) {
    const int rank = contact.rank;
    const bool is_new = rank > 0 && rank < world_.size && lines_[rank] == nullptr;
    if (!is_new && contact.meeting == meeting_of_launchers(world_)) return;  // the rank's own connection tells more
    const bool fits = contact.size == world_.size && is_new;
    auto line = std::make_shared<Line>(
        std::move(contact.socket),
        [this, rank, fits](const nlohmann::json& message) {
          if (fits) arrived(rank, message);
        },
        [this, rank, fits](const std::string& why) {
          if (fits) ended(rank, why);
        });
    all_.push_back(line);
    if (rank > 0) came_.insert(rank);
    note_met(met_file_, rank);
    ++sizes_[contact.size];
    line->start();
    if (farewell_) return line->send(farewell_);
    if (contact.size != world_.size)
      return fail(rank, str("rank 0: rank ", rank, " has WORLD_SIZE ", contact.size, ", rank 0 has ", world_.size,
                            ": start all ranks with one WORLD_SIZE"));
    if (!fits)
      return fail(rank, str("rank 0: two processes are rank ", rank, " (communicator '", options_.name, "', epoch ",
                            options_.epoch, "): do two jobs meet at one port? Give each its own"));
    lines_[rank] = line;
    line->send({{"session", hexadecimal(session_)}});
    line->send(status_message());
  }

  void arrived(int rank, const nlohmann::json& message) {
    if (message.contains("said")) {
      said_.at(rank) = message.at("said").get<std::string>();
      finish_round();
    } else if (message.contains("failed")) {
      fail_as_told(message.at("failed"));
    }
  }

  void ended(int rank, const std::string& why) {
    if (!leaving_) fail_by_end(rank, why);
  }

  void say(const std::string& mine) override {
    said_[0] = mine;
    for (const auto& line : lines_)
      if (line) line->send(status_message());
    finish_round();
  }

  void finish_round() {
    if (!missing().empty()) return;
    result_.emplace();
    for (auto& text : said_) result_->push_back(*std::exchange(text, std::nullopt));
    listener_.close();
    const Line::Frame all = Line::frame_of({{"all", *result_}});
    for (const auto& line : lines_)
      if (line) line->send(all);
  }

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int rank = 0; rank < world_.size; ++rank)
      if (!said_[rank]) ranks.push_back(rank);
    return ranks;
  }

  nlohmann::json status_message() const {
    if (taken_place_.empty()) return {{"missing", missing()}, {"lacks", status_.lacks}};
    return {
        {"missing", {0}},
        {"lacks", str("cannot listen at ", taken_place_, ", which is taken (by a job with the same MASTER_PORT?)")}};
  }

  std::string waits_for() const override { return Meeting::waits_for({missing(), status_.lacks}); }

  CommError late() const override { return Meeting::late({missing(), status_.lacks}); }

  void pulse() override {
    const Line::Frame beat = Line::frame_of(status_message());
    for (int rank = 1; rank < world_.size; ++rank) {
      const auto& line = lines_[rank];
      if (!line || !line->is_open()) continue;
      if (was_stopped_) line->listen_anew();
      line->send(beat);
      if (looks_for_silence() && Clock::now() - line->last_heard() > options_.liveness) fail(rank, silence_of(rank));
    }
  }

  /// As far as this rank knows: by the WORLD_SIZE that most have, the larger one of two.
  bool have_all_come() const {
    const auto fewer = [](const auto& a, const auto& b) {
      return std::tie(a.second, a.first) < std::tie(b.second, b.first);
    };
    const int size = std::max_element(sizes_.begin(), sizes_.end(), fewer)->first;
    const int others = size - 1 - (dead_ && !came_.contains(*dead_) ? 1 : 0);
    return std::ssize(came_) >= others && !listener_.is_being_called();
  }

  bool all_closed() const {
    return std::none_of(all_.begin(), all_.end(), [](const auto& line) { return line->is_open(); });
  }

  const Bytes32 session_;
  std::vector<std::optional<std::string>> said_;  ///< in this round, by rank
  std::vector<std::shared_ptr<Line>> lines_;      ///< by rank; null: has not come
  std::vector<std::shared_ptr<Line>> all_;        ///< also of those that cannot take part
  std::set<int> came_;
  std::map<int, int> sizes_{{world_.size, 1}};  ///< how many ranks have each WORLD_SIZE
  std::string taken_place_;                     ///< that this rank waits for; empty: none
  bool leaving_ = false;
  Line::Frame farewell_;  ///< also for those who come while this rank gives up
  MeetingPlace place_;
  Listener listener_;
};

// ---- the others

class MeetingGuest final : public Meeting {
 public:
  MeetingGuest(asio::io_context& io, const World& world, const ConnectOptions& options, Route route,
               Encryption* encryption)
      : Meeting(io, world, options),
        caller_(std::make_shared<Caller>(
            io, introduction_of(world, options, route, encryption),
            [place = std::make_shared<MeetingPlace>(world, options, watch_, route)] { return place->places(); },
            [this](Contact contact) { connected(std::move(contact)); })) {}

  void join() override {
    caller_->start();
    wait_until([this] { return !session_.empty(); }, [this] { return waits_for(); }, [this] { return late(); });
  }
  ~MeetingGuest() override {
    caller_->close();
    if (line_) line_->close();
  }

  void leave() override { line_->close(); }

  void give_up(const CommError& error) noexcept override {
    if (!line_ || !line_->is_open()) return;
    try {
      line_->send(failure_frame(error));
    } catch (...) {
      return;  // rank 0 finds the connection closed
    }
    drain(give_up_limit, [this] { return !line_->is_open(); });
  }

  std::string session_key() const override { return MeetingHost::session_key_of(world_, session_); }
  Ends ends() const override { return ends_; }

 private:
  void connected(Contact contact) {
    ends_ = contact.ends;
    line_ = std::make_shared<Line>(
        std::move(contact.socket), [this](const nlohmann::json& message) { arrived(message); },
        [this](const std::string& why) { fail_by_end(0, why); });
    line_->start();
    note_met(met_file_, 0);
    look_for_dead();  // the launcher may soon end this rank too
  }

  void arrived(const nlohmann::json& message) {
    if (message.contains("session")) {
      session_ = message.at("session").get<std::string>();
    } else if (message.contains("all")) {
      auto all = message.at("all").get<std::vector<std::string>>();
      if (std::ssize(all) != world_.size) throw std::runtime_error(str("words of ", all.size(), " ranks"));
      result_ = std::move(all);
    } else if (message.contains("failed")) {
      fail_as_told(message.at("failed"));
      line_->close();
    } else {
      Status status{{}, message.at("lacks").get<std::string>()};
      for (const nlohmann::json& rank : message.at("missing")) {
        if (!is_rank(integer_in(rank))) throw std::runtime_error(str("no rank: ", rank.dump()));
        status.missing.push_back(rank.get<int>());
      }
      status_ = std::move(status);
    }
  }

  void say(const std::string& mine) override { line_->send({{"said", mine}}); }

  std::string waits_for() const override {
    return line_ ? Meeting::waits_for({missing(), status_.lacks}) : "rank 0 at " + caller_->outcomes();
  }

  CommError late() const override {
    if (line_) return Meeting::late({missing(), status_.lacks});
    return {
        0, "rendezvous",
        str("rank ", world_.rank, ": rank 0 cannot be reached within ", options_.timeout.count(), " ms at ",
            caller_->outcomes(), ": it has not started or has ended", caller_->lacks_answers() ? " or is stopped" : "",
            ", or MASTER_ADDR and MASTER_PORT (dualpipe-run: --rendezvous) do not name its host and a port that this "
            "host reaches there")};
  }

  /// The others, as rank 0 last said.
  std::vector<int> missing() const {
    std::vector<int> others = status_.missing;
    std::erase(others, world_.rank);
    return others;
  }

  void pulse() override {
    if (!line_ || !line_->is_open()) return;
    if (was_stopped_) line_->listen_anew();
    line_->send({{"beat", true}});
    if (looks_for_silence() && Clock::now() - line_->last_heard() > options_.liveness) fail(0, silence_of(0));
  }

  std::string session_;
  Ends ends_;
  std::shared_ptr<Line> line_;  ///< null: not connected so far
  const std::shared_ptr<Caller> caller_;
};

}  // namespace

std::unique_ptr<Meeting> meet(asio::io_context& io, const World& world, const ConnectOptions& options, Route route,
                              Encryption* encryption) {
  if (world.rank == 0) return std::make_unique<MeetingHost>(io, world, options, route, encryption);
  return std::make_unique<MeetingGuest>(io, world, options, route, encryption);
}

}  // namespace dualpipe::detail
