// Chat templates and answer parsing, through llama.cpp's common library.

#include "guard.h"

#include "chat.h"

struct mnv_chat {
    common_chat_templates_ptr templates;
};

int mnv_chat_new(const llama_model * model, const char * template_override, mnv_chat ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        // Without this check the library would quietly take ChatML for a model that has no template.
        if (!template_override && !llama_model_chat_template(model, nullptr)) {
            return MNV_NULL;
        }
        auto chat       = std::make_unique<mnv_chat>();
        chat->templates = common_chat_templates_init(model, template_override ? template_override : "");
        *out            = chat.release();
        return MNV_OK;
    });
}

void mnv_chat_free(mnv_chat * chat) {
    delete chat;
}

int mnv_chat_apply(const mnv_chat * chat, const char * request, char ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        const common_json json = common_json::parse(request);

        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(json.at("messages"));
        if (json.contains("tools")) {
            inputs.tools = common_chat_tools_parse_oaicompat(json.at("tools"));
        }
        if (json.contains("tool_choice")) {
            inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(json.at("tool_choice").get<std::string>());
        }
        if (json.contains("add_generation_prompt")) {
            inputs.add_generation_prompt = json.at("add_generation_prompt").get<bool>();
        }

        const common_chat_params params = common_chat_templates_apply(chat->templates.get(), inputs);

        common_json result          = common_json::object();
        result["prompt"]            = params.prompt;
        result["format"]            = static_cast<int>(params.format);
        result["parser"]            = params.parser;
        result["grammar"]           = params.grammar;
        result["grammar_lazy"]      = params.grammar_lazy;
        result["generation_prompt"] = params.generation_prompt;
        result["additional_stops"]  = params.additional_stops;
        result["preserved_tokens"]  = params.preserved_tokens;
        *out                        = mnv_string_new(result.dump());
        return MNV_OK;
    });
}

int mnv_chat_parse(const char * syntax, const char * text, bool is_partial, char ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        const common_json json = common_json::parse(syntax);

        common_chat_parser_params params;
        params.format            = static_cast<common_chat_format>(json.at("format").get<int>());
        params.generation_prompt = json.at("generation_prompt").get<std::string>();
        const auto parser        = json.at("parser").get<std::string>();
        if (!parser.empty()) {
            params.parser.load(parser);
        }
        const common_chat_msg message = common_chat_parse(text, is_partial, params);
        *out                          = mnv_string_new(message.to_json_oaicompat().dump());
        return MNV_OK;
    });
}
