#include "socket/announcement.hpp"

#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "socket/host.hpp"
#include "socket/wire.hpp"

namespace dualpipe::detail {
namespace {

constexpr const char* announcement_key = "announcement";
constexpr const char* endpoints_key = "tcp";
constexpr std::size_t longest_unix_name = 100;  // of the 107 bytes that Linux allows

std::string random_token() {
  std::random_device random;
  std::string token;
  while (token.size() < Announcements::token_length) token += "0123456789abcdef"[random() % 16];
  return token;
}

}  // namespace

Announcements::Announcements(const World& world, Rendezvous& rendezvous, Route route)
    : world_(world), rendezvous_(rendezvous), announcements_(world.size) {
  Announcement& own = announcements_[world.rank];
  own.host = host_identity() + (route == Route::tcp ? str(" ", world.rank) : "");
  own.token = random_token();
  if (world.rank + 1 < world.size) own.unix_name = "dualpipe." + own.token;
}

void Announcements::exchange() {
  nlohmann::json announcement = {
      {"version", wire::protocol_version}, {"size", world_.size}, {"host", own().host}, {"token", own().token}};
  if (!own().unix_name.empty()) announcement["unix"] = own().unix_name;
  rendezvous_.publish(announcement_key, announcement.dump());

  std::vector<int> others;
  for (int rank = 0; rank < world_.size; ++rank)
    if (rank != world_.rank) others.push_back(rank);
  const std::vector<std::string> texts = rendezvous_.collect(announcement_key, others);
  for (std::size_t i = 0; i < others.size(); ++i) read_announcement(others[i], texts[i]);
}

bool Announcements::has_far_callers() const {
  for (int rank = world_.rank + 1; rank < world_.size; ++rank)
    if (!is_near(rank)) return true;
  return false;
}

void Announcements::announce(std::uint16_t port) {
  const std::vector<std::string> addresses = own_addresses(world_);
  const std::string text = nlohmann::json({{"port", port}, {"addresses", addresses}}).dump();
  rendezvous_.publish(endpoints_key, text);
  read_endpoints(world_.rank, text);
}

void Announcements::read_far_endpoints() {
  std::vector<int> listeners;
  for (int rank = 0; rank < world_.rank; ++rank)
    if (is_far_listener(rank)) listeners.push_back(rank);
  const std::vector<std::string> texts = rendezvous_.collect(endpoints_key, listeners);
  for (std::size_t i = 0; i < listeners.size(); ++i) read_endpoints(listeners[i], texts[i]);
}

void Announcements::read_again(int rank) {
  read_announcement(rank, rendezvous_.collect(announcement_key, {rank}).front());
  if (is_far_listener(rank)) read_endpoints(rank, rendezvous_.collect(endpoints_key, {rank}).front());
}

template <class Action>
void Announcements::parse(int rank, const std::string& text, const Action& action) const {
  const auto malformed = [&](const std::string& problem) {
    return CommError(rank, "rendezvous",
                     str("rank ", world_.rank, ": rank ", rank, " has published something malformed (", problem,
                         "): does another program use the store under the same name?"));
  };
  try {
    action(nlohmann::json::parse(text));
  } catch (const nlohmann::json::exception& error) {
    throw malformed(error.what());
  } catch (const std::invalid_argument& error) {
    throw malformed(error.what());
  }
}

void Announcements::read_announcement(int rank, const std::string& text) {
  const auto disagree = [&](const char* what, std::int64_t theirs, std::int64_t ours) {
    throw CommError(rank, "rendezvous",
                    str("rank ", world_.rank, ": rank ", rank, " has ", what, " ", theirs, ", this rank ", ours,
                        ": start all ranks from one build and with one WORLD_SIZE"));
  };
  parse(rank, text, [&](const nlohmann::json& json) {
    const std::int64_t version = json.at("version");
    const std::int64_t size = json.at("size");
    if (version != wire::protocol_version) disagree("protocol version", version, wire::protocol_version);
    if (size != world_.size) disagree("WORLD_SIZE", size, world_.size);
    Announcement& known = announcements_[rank];
    known.host = json.at("host");
    known.token = json.at("token");
    known.unix_name = json.value("unix", "");
    if (known.token.size() != token_length)
      throw std::invalid_argument(str("a token of ", known.token.size(), " bytes"));
    if (known.unix_name.size() > longest_unix_name)
      throw std::invalid_argument(str("a Unix address of ", known.unix_name.size(), " bytes"));
  });
}

void Announcements::read_endpoints(int rank, const std::string& text) {
  parse(rank, text, [&](const nlohmann::json& json) {
    const std::int64_t port = json.at("port");
    if (port < 1 || port > 65535) throw std::invalid_argument(str("port ", port));
    auto& endpoints = announcements_[rank].endpoints;
    endpoints.clear();
    for (const std::string address : json.at("addresses")) {
      asio::error_code error;
      const auto parsed = asio::ip::make_address(address, error);
      if (error) throw std::invalid_argument("address '" + address + "'");
      endpoints.emplace_back(parsed, static_cast<std::uint16_t>(port));
    }
  });
}

}  // namespace dualpipe::detail
